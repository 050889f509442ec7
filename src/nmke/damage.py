"""Files that somebody else may have written: whatever their content breaks is one error about the file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from safetensors import SafetensorError

from nmke.errors import LedgerError, NmkeError, is_out_of_memory

# What reading a value of the wrong kind, size or name raises; torch's own errors are RuntimeErrors.
_BREAKS = (
    SafetensorError,
    ValueError,
    KeyError,
    IndexError,
    TypeError,
    AttributeError,
    RuntimeError,
    OverflowError,
)


@contextmanager
def read_as(what: str, cure: str = "restore the run from a backup") -> Iterator[None]:
    """Turn what damaged content breaks inside the `with` into one error; running out of memory stays what it is.

    Args:
        what: The file, for the message.
        cure: What to do about it.

    Raises:
        LedgerError: If the content is not what it should be.
    """
    try:
        yield
    except NmkeError:
        raise
    except _BREAKS as error:
        if is_out_of_memory(error):
            raise
        raise LedgerError(f"{what} is damaged ({reason(error)}); {cure}") from error


def reason(error: BaseException) -> str:
    """Kind and words of an error in a line; the bytes that some errors carry along are left out."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def load_json(text: str) -> Any:
    """What a JSON text holds.

    Raises:
        ValueError: If it is no JSON, or nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
