"""Methods with settings as a plan writes them: "nmke", "nmke[mask=random,l2=10]", "unedited"."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from nmke.errors import ConfigError, unknown_name

UNEDITED = "unedited"
_LABEL = re.compile(r"\s*([\w.-]+)\s*(?:\[([^\[\]]*)\]\s*)?")
_BETWEEN = re.compile(r",(?![^\[\]]*\])")


@dataclass(frozen=True)
class Variant:
    """A method and what is changed about it.

    Args:
        label: As written, without spaces.
        method: The method's name, or `UNEDITED`.
        settings: Settings by name, as text; `EditConfig` gives them their types.
    """

    label: str
    method: str
    settings: dict[str, Any]


def split_labels(text: str) -> list[str]:
    """The labels of a list with commas; commas in brackets part settings."""
    return [part.strip() for part in _BETWEEN.split(text) if part.strip()]


def parse_label(text: str, methods: Iterable[str]) -> Variant:
    """The method and settings that a label names.

    Args:
        text: Such as "nmke[mask=random]".
        methods: Registered names.

    Raises:
        ConfigError: If it is malformed, or its method unknown; names the nearest.
    """
    found = _LABEL.fullmatch(text)
    if found is None:
        raise ConfigError(
            f"method {text!r} cannot be read; write a name, or a name with settings as 'nmke[mask=random,l2=10]'"
        )
    name, inside = found[1], found[2] or ""
    known = [*methods, UNEDITED]
    if name not in known:
        raise ConfigError(unknown_name("method", name, known))
    settings = dict(_setting(part, text) for part in inside.split(",") if part.strip())
    if name == UNEDITED and settings:
        raise ConfigError(
            f"{text!r}: the unedited model has no settings; write 'unedited' alone, or name a method"
        )
    written = ",".join(f"{key}={value}" for key, value in settings.items())
    return Variant(f"{name}[{written}]" if written else name, name, settings)


def _setting(part: str, label: str) -> tuple[str, Any]:
    name, equals, value = (piece.strip() for piece in part.partition("="))
    if not (name and equals and value):
        raise ConfigError(f"method {label!r}: {part.strip()!r} is no setting; write name=value")
    return name, value
