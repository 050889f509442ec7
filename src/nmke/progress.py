"""One way to report progress; the command line and the studio each implement it, libraries only call it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol, runtime_checkable


@runtime_checkable
class Task(Protocol):
    """A running piece of work."""

    def advance(self, steps: float | int = 1, note: str = "") -> None:
        """Some steps are done; `note` is a few words on what just happened."""
        ...


@runtime_checkable
class Progress(Protocol):
    """Opens tasks."""

    def task(self, title: str, total: float | int) -> AbstractContextManager[Task]:
        """A context in which a task of `total` steps runs."""
        ...


class _Quiet:
    @contextmanager
    def task(self, title: str, total: float | int) -> Iterator[Task]:
        """A task that nobody watches."""
        yield self

    def advance(self, steps: float | int = 1, note: str = "") -> None:
        """Nothing to show."""


quiet: Progress = _Quiet()
silent: Task = _Quiet()
