"""Named registries: methods, attribution scores, benchmarks and exporters are looked up by name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

from nmke.errors import ConfigError, unknown_name

T = TypeVar("T")


@dataclass(frozen=True)
class Entry(Generic[T]):
    """One registered thing: its name, the thing itself, where it comes from and a line about it.

    Args:
        name: What it is looked up by.
        value: The thing.
        source: Paper or origin.
        summary: One line.
        needs: What must be there before it can run, in words ("key statistics"); empty when nothing.
        differs: How it departs from its source, from the "Differs:" part of its module's docstring.
    """

    name: str
    value: T
    source: str
    summary: str
    needs: tuple[str, ...] = ()
    differs: str = ""


class Registry(Generic[T]):
    """A closed set of names, filled when the package is imported.

    Args:
        kind: What the names stand for, used in errors ("method", "attribution score").
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, Entry[T]] = {}

    def register(
        self,
        name: str,
        value: T,
        *,
        source: str,
        summary: str,
        needs: tuple[str, ...] = (),
        doc: str | None = None,
    ) -> T:
        """Add `value` under `name`; a name is taken once.

        Args:
            name: What it is looked up by.
            value: The thing.
            source: Paper or origin.
            summary: One line.
            needs: See `Entry`.
            doc: The module's docstring, whose part behind "Differs:" is kept.

        Raises:
            ConfigError: If the name is already registered.
        """
        if name in self._entries:
            raise ConfigError(f"{self.kind} {name!r} is registered twice; choose another name")
        differs = " ".join((doc or "").partition("\nDiffers")[2].partition(":")[2].split())
        self._entries[name] = Entry(name, value, source, summary, needs, differs)
        return value

    def get(self, name: str) -> T:
        """The thing registered under `name`.

        Raises:
            ConfigError: If there is none; the message names the nearest.
        """
        return self.entry(name).value

    def entry(self, name: str) -> Entry[T]:
        """The whole entry of `name`, with source and summary."""
        if name not in self._entries:
            raise ConfigError(unknown_name(self.kind, name, self._entries))
        return self._entries[name]

    def names(self) -> tuple[str, ...]:
        """Every registered name, in the order of registration."""
        return tuple(self._entries)

    def __iter__(self) -> Iterator[Entry[T]]:
        return iter(self._entries.values())

    def __contains__(self, name: object) -> bool:
        return name in self._entries
