"""What a record shape is, and what several of them share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from nmke.errors import RequestError
from nmke.facts.prompts import parse_prompt
from nmke.facts.record import Record
from nmke.types import EditCase


@dataclass(frozen=True)
class Shape:
    """One way to write a record.

    Args:
        name: Short name, printed as the guess.
        summary: What it is, for messages.
        signs: Fields of which one marks the shape.
        used: Fields that are read.
        convert: Record and `derived` to a case.
        strict: Refuse unknown fields and facts that cannot be edited.
    """

    name: str
    summary: str
    signs: frozenset[str]
    used: frozenset[str]
    convert: Callable[[Record, bool], EditCase]
    strict: bool = False


def template(record: Record, field: str, subject: str | None) -> tuple[str, str]:
    """Template and subject of the record's prompt, or the error that names the field."""
    prompt = record.text(field)
    try:
        return parse_prompt(prompt, subject)
    except RequestError as error:
        raise record.unusable(field, str(error)) from error


def string(record: Record, field: str) -> str:
    """A target written as {"str": "Paris", "id": "Q90"}, as {"label": "Paris"} or plainly."""
    value = record.data.get(field)
    if not isinstance(value, dict):
        return record.text(field).strip()
    return record.nested(field, value).text("str" if "str" in value else "label").strip()
