"""Who may use the model now: one at a time, first come, first served, so that no one is starved by a long job."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event, Lock

from nmke.studio.limits import StudioError


class Gate:
    """A lock with a line in front of it.

    Args:
        most_waiting: How long the line may be for those who are not patient.
    """

    def __init__(self, most_waiting: int) -> None:
        self._most = most_waiting
        self._lock = Lock()
        self._busy = False
        self._line: deque[Event] = deque()

    @contextmanager
    def turn(self, *, patient: bool = False) -> Iterator[None]:
        """The right to use the model inside the `with`.

        Args:
            patient: Stand in line however long it is.

        Raises:
            StudioError: "queue_full", if the line is too long.
        """
        self._enter(patient)
        try:
            yield
        finally:
            with self._lock:
                if self._line:
                    self._line.popleft().set()
                else:
                    self._busy = False

    @property
    def waiting(self) -> int:
        """How many stand in line."""
        return len(self._line)

    def _enter(self, patient: bool) -> None:
        with self._lock:
            if not self._busy:
                self._busy = True
                return
            if not patient and len(self._line) >= self._most:
                raise StudioError(
                    429,
                    "queue_full",
                    f"{len(self._line)} requests wait for the model already, at most {self._most} may; try again later",
                )
            ticket = Event()
            self._line.append(ticket)
        ticket.wait()
