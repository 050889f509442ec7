"""JSON text to objects, with every way of being broken turned into one error."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from nmke.errors import RequestError

MAX_RECORD = 16 * 2**20


@dataclass(frozen=True)
class Row:
    """A record as read, and the line on which it begins (from 1)."""

    line: int
    data: dict[str, Any]


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object's pairs as a dict; a key that stands twice is an error, not a silent loss."""
    data = dict(pairs)
    if len(data) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"field {twice[:40]!r} stands twice")
    return data


DECODER = json.JSONDecoder(object_pairs_hook=_distinct)


def broken_json(source: str, line: int, error: Exception) -> RequestError:
    """The error for JSON that does not parse, with line and column."""
    if isinstance(error, RecursionError):
        return RequestError(f"{source}, line {line}: JSON nested too deeply; write plain records")
    place, reason = f"line {line}", str(error)
    if isinstance(error, json.JSONDecodeError):
        place, reason = f"line {line}, column {error.colno}", error.msg
    return RequestError(
        f"{source}, {place}: broken JSON ({reason}); write one complete object per line, or all in one array"
    )


def load_object(text: str, source: str, line: int) -> dict[str, Any]:
    """The object written on one line.

    Raises:
        RequestError: If the line is not valid JSON or not an object.
    """
    try:
        value = DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        raise broken_json(source, line, error) from error
    if not isinstance(value, dict):
        raise not_an_object(source, line, text)
    return value


def not_an_object(source: str, line: int, text: str) -> RequestError:
    """The error for a record that is a list, a text, a number or null."""
    found = text.strip()[:40]
    return RequestError(f"{source}, line {line}: {found!r} is not a JSON object; write records as {{...}}")
