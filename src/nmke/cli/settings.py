"""Settings from four places: flags before `NMKE_*` variables before `--config` before the run's own recipe.

The flags are made from `EditConfig`, so that a new setting is a new flag with its description as help text.
"""

from __future__ import annotations

import difflib
import inspect
import os
from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import typer

from nmke.config import EditConfig, parse_layers, read_config
from nmke.errors import ConfigError

PREFIX = "NMKE_"
# Variables that are not settings of an edit.
OTHER_VARIABLES = (
    "NMKE_CACHE",
    "NMKE_DATA",
    "NMKE_WHEELS",
    "NMKE_DTYPE",
    "NMKE_DEVICE",
    "NMKE_TOKEN",
    "NMKE_DETERMINISTIC",
)
GROUPS = {
    "method": "Method",
    "steps": "Target values",
    "l2": "Solve",
    "mask": "Neuron mask",
    "corpus": "Key statistics",
    "health_every": "Health",
}
STATS_SETTINGS = ("method", "layers", "corpus", "corpus_tokens", "seed")  # what statistics depend on
Command = TypeVar("Command", bound=Callable[..., None])


def takes_settings(*names: str) -> Callable[[Command], Command]:
    """Give a command one flag per setting; it receives those that were set in its argument `settings`.

    Args:
        names: Only these settings; none given means all of them.
    """

    def decorate(command: Command) -> Command:
        own = inspect.signature(command, eval_str=True)
        flags = [flag for flag in _flags() if not names or flag.name in names]
        chosen = {flag.name for flag in flags}

        @wraps(command)
        def with_flags(**given: Any) -> None:
            settings = {name: given.pop(name) for name in chosen}
            command(**given, settings={k: v for k, v in settings.items() if v is not None})

        parameters = [p for p in own.parameters.values() if p.name != "settings"]
        everything = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in (*parameters, *flags)]
        with_flags.__signature__ = own.replace(parameters=everything)  # type: ignore[attr-defined]
        with_flags.__annotations__ = {p.name: p.annotation for p in everything}
        return with_flags  # type: ignore[return-value]

    return decorate


def merge(
    flags: Mapping[str, Any], config: Path | None = None, recipe: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The settings that were given anywhere, the strongest place winning; checked, without defaults.

    Raises:
        ConfigError: If one is unknown (the nearest is named) or out of range.
    """
    from_file = {} if config is None else read_config(config)
    given = {**(recipe or {}), **from_file, **from_environment(), **flags}
    if "layers" in given:
        given["layers"] = parse_layers(given["layers"])
    config_of_all = EditConfig.create(**given)
    return {name: getattr(config_of_all, name) for name, value in given.items() if value is not None}


def from_environment() -> dict[str, str]:
    """Settings in `NMKE_*` variables.

    Raises:
        ConfigError: If a variable looks like a misspelt setting.
    """
    known = {PREFIX + name.upper(): name for name in EditConfig.model_fields}
    found = {}
    for variable, value in os.environ.items():
        if not variable.startswith(PREFIX) or not value:
            continue
        if variable in known:
            found[known[variable]] = value
        elif variable not in OTHER_VARIABLES:
            near = difflib.get_close_matches(variable, known, n=1, cutoff=0.8)
            if near:
                raise ConfigError(f"unknown variable {variable!r}; did you mean {near[0]!r}?")
    return found


def _flags() -> list[inspect.Parameter]:
    """One keyword parameter per field of `EditConfig`, with its help text."""
    flags, group = [], "Method"
    for name, field in EditConfig.model_fields.items():
        group = GROUPS.get(name, group)
        option = typer.Option(
            "--" + name.replace("_", "-"), help=_help(name, field), rich_help_panel=group, show_default=False
        )
        flags.append(
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=None,
                annotation=Annotated[_flag_type(name, field.annotation), option],
            )
        )
    return flags


def _flag_type(name: str, annotation: Any) -> Any:
    """The type a flag is read as: a choice or a number where the field has one, else text."""
    if name == "layers":
        return str | None
    inner = next((part for part in get_args(annotation) if part is not type(None)), annotation)
    if get_origin(annotation) is Literal:
        return annotation | None
    if annotation is bool:
        return Literal["true", "false"] | None
    for plain in (int, float):
        if plain in (annotation, inner) or plain in get_args(inner):
            return plain | None
    return str | None


def _help(name: str, field: Any) -> str:
    description = str(field.description)
    if name == "layers":
        return f"{description.partition(';')[0]}: auto, 4-8 or 4,5 (default auto: by relative depth)."
    default = "the method's own" if field.default is None else field.default
    return f"{description.rstrip('.')} (default {default})."
