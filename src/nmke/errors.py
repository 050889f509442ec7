"""The errors users meet, each saying what was asked, what was found, and what to do.

Every error a user can cause is an `NmkeError`; the command line prints it as one line and leaves with
its `exit_code` (the codes are part of the interface, see the CLI reference).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

# What torch's allocator for the CPU says, in a plain RuntimeError.
_ALLOCATOR = ("can't allocate memory", "not enough memory")


class NmkeError(Exception):
    """Base of every error that this package raises on purpose."""

    exit_code = 1


class RequestError(NmkeError):
    """A fact, a facts file or another input is missing or malformed."""

    exit_code = 3


class ConfigError(NmkeError):
    """A setting is unknown, out of range, or does not go with another one."""

    exit_code = 2


class LayoutError(NmkeError):
    """The model's structure is not one that can be edited."""

    exit_code = 4


class StatsError(NmkeError):
    """Key statistics are missing, damaged, or belong to other weights."""


class NumericsError(NmkeError):
    """A computation gave non-finite numbers or an ill-conditioned system."""


class MemoryPlanError(NmkeError):
    """The job does not fit in memory; the message names a smaller plan."""

    exit_code = 5


class HealthError(NmkeError):
    """An edit did not take or the model's health crossed a limit, in strict mode."""

    exit_code = 6


class LedgerError(NmkeError):
    """A run folder is missing, locked, damaged, or does not go with the model."""


class VerifyError(LedgerError):
    """Recomputed hashes differ from the recorded ones."""

    exit_code = 7


class RankError(NmkeError):
    """A process that shares the work is gone, does not answer, or holds other weights."""


class ExportError(NmkeError):
    """An export could not be written or does not reproduce the session's logits."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, of the process or of a device."""
    names = {kind.__name__ for kind in type(error).__mro__}
    said = str(error)
    return bool(names & {"MemoryError", "OutOfMemoryError"}) or any(words in said for words in _ALLOCATOR)


def unknown_name(kind: str, name: str, known: Iterable[str]) -> str:
    """The message for a name that does not exist, with the nearest one that does.

    Args:
        kind: What was looked up, such as "method".
        name: What was asked for.
        known: Every name that exists.

    Returns:
        One sentence in three parts: asked, nearest, available.
    """
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ";"
    return f"unknown {kind} {name!r}{hint} Available: {', '.join(names) or 'none'}"
