"""One record of a facts file with typed access to its fields; each fault names file, line and field."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from nmke.errors import RequestError, unknown_name

MAX_TEXT = 20_000
MAX_ID = 100
_PLAIN_ID = re.compile(rf"(?!\.)[^/\\\x00-\x1f\x7f]{{1,{MAX_ID}}}")


class UnusableFact(RequestError):
    """A record that is well formed but cannot be edited (no subject in the prompt, empty target)."""


@dataclass(frozen=True)
class Record:
    """Fields of one record.

    Args:
        data: The record as read.
        source: Path of the file, for messages.
        line: Line on which the record begins, from 1.
        prefix: Names in front of the fields, for nested records ("requested_rewrite.").
    """

    data: dict[str, Any]
    source: str
    line: int
    prefix: str = ""

    def error(self, field: str, message: str) -> RequestError:
        """The error for a malformed field."""
        return RequestError(f"{self._where(field)}: {message}")

    def unusable(self, field: str, message: str) -> UnusableFact:
        """The error for a well-formed field that makes the fact impossible to edit."""
        return UnusableFact(f"{self._where(field)}: {message}")

    def closed(self, known: Iterable[str]) -> None:
        """Refuse every field that is not known, naming the nearest."""
        for name in self.data:
            if name not in known:
                raise self.error(name, unknown_name("field", name, known))

    def optional(self, field: str) -> str | None:
        """The text of a field, or None when it is absent, null or blank."""
        value = self.data.get(field)
        if value is None:
            return None
        return self.checked(field, value).strip() or None

    def text(self, field: str) -> str:
        """The text of a field that must be there and not be blank."""
        if self.data.get(field) is None:
            raise self.error(field, f"is missing; the record has {_names(self.data)}; add it")
        value = self.checked(field, self.data[field])
        if not value.strip():
            raise self.unusable(field, f"is empty ({value[:40]!r}); fill it in or remove the record")
        return value

    def texts(self, field: str) -> tuple[str, ...]:
        """The texts of a list field; absent and null are an empty list, a single text is a list of one."""
        value = self.data.get(field)
        if value is None:
            return ()
        values = [value] if isinstance(value, str) else value
        if not isinstance(values, list):
            raise self.error(field, f"is {_kind(value)}; write a list of texts")
        texts = tuple(self.checked(f"{field}[{index}]", item) for index, item in enumerate(values))
        return tuple(text for text in texts if text.strip())

    def first(self, field: str) -> str | None:
        """The text of a field, or of the first item of lists in it (answers may be nested lists)."""
        value = self.data.get(field)
        while isinstance(value, list):
            value = value[0] if value else None
        return None if value is None else self.checked(field, value).strip() or None

    def answers(self, field: str) -> tuple[str, ...]:
        """Every text of a field, however deep its lists are nested; blank ones are left out."""
        found, open_values = [], [self.data.get(field)]
        while open_values:
            value = open_values.pop()
            if isinstance(value, list):
                open_values += reversed(value)
            elif value is not None and (text := self.checked(field, value).strip()):
                found.append(text)
        return tuple(dict.fromkeys(found))

    def items(self, field: str) -> tuple[Any, ...]:
        """The items of a list field; absent and null are an empty list."""
        value = self.data.get(field)
        if value is None:
            return ()
        if not isinstance(value, list):
            raise self.error(field, f"is {_kind(value)}; write a list")
        return tuple(value)

    def nested(self, field: str, value: Any) -> Record:
        """A record inside this one."""
        if not isinstance(value, dict):
            raise self.error(field, f"is {_kind(value)}; write an object with named fields")
        return Record(value, self.source, self.line, f"{self.prefix}{field}.")

    def identifier(self, field: str, shape: str) -> str:
        """The record's id: text as it is, a number as `<shape>-<number>`, absent as "".

        Ids become file names, so they hold no slash and no control character and do not begin with a dot.
        """
        value = self.data.get(field)
        if isinstance(value, int) and not isinstance(value, bool):
            return f"{shape}-{value}"
        name = self.optional(field) or ""
        if name and not _PLAIN_ID.fullmatch(name):
            raise self.error(
                field,
                f"{name[:60]!r} cannot be an id; use at most {MAX_ID} characters, no slash or line break, "
                "and no dot in front",
            )
        return name

    def checked(self, field: str, value: Any) -> str:
        """The value if it is a text that can be written as UTF-8 and is not overlong."""
        if not isinstance(value, str):
            raise self.error(field, f"is {_kind(value)}; write a text in quotes")
        if len(value) > MAX_TEXT:
            raise self.error(field, f"has {len(value):,} characters; at most {MAX_TEXT:,} are read")
        if any("\ud800" <= letter <= "\udfff" for letter in value):
            raise self.error(
                field, "holds half of a surrogate pair (\\ud800-\\udfff); write the whole character"
            )
        return value

    def _where(self, field: str) -> str:
        return f"{self.source}, line {self.line}, field {(self.prefix + field)[:80]!r}"


def _kind(value: Any) -> str:
    """What a JSON value is, in words."""
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _names(data: dict[str, Any]) -> str:
    """The field names, cut to a line."""
    return ", ".join(repr(name[:40]) for name in list(data)[:12]) or "no field"
