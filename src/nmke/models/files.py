"""Model files from strangers, looked at before a library reads them: sizes that cannot be true are refused.

A few bytes in a header can ask for a billion layers or an endless list; what is asked for is compared with what the
files hold, so that neither memory nor time goes into it.
"""

from __future__ import annotations

import json
import math
import mmap
import struct
from pathlib import Path
from typing import Any

from nmke.damage import reason
from nmke.errors import RequestError

INDEX = "model.safetensors.index.json"
WHOLE = "model.safetensors"
MOST_HEADER = 100 * 2**20  # as the safetensors library has it
MOST_DIMENSIONS = 8
MOST_WEIGHTS_PER_BYTE = 8  # no quantisation stores a weight in less than a bit
_FIXED = {
    0: 1,
    1: 1,
    2: 2,
    3: 2,
    4: 4,
    5: 4,
    6: 4,
    7: 1,
    10: 8,
    11: 8,
    12: 8,
}  # bytes by type number, GGUF v3
_STRING, _ARRAY = 8, 9


def weight_files(folder: Path) -> list[str]:
    """Names of the safetensors files that a model folder consists of.

    Raises:
        RequestError: If its index is damaged, or names a file outside the folder.
    """
    index = folder / INDEX
    if not index.is_file() or (folder / WHOLE).is_file():
        return [WHOLE]
    named = _object(index).get("weight_map")
    names = sorted(set(named.values())) if isinstance(named, dict) and named and _texts(named) else []
    if not names or any(Path(name).name != name for name in names):
        raise RequestError(f"{str(index)!r} names no files of its own folder; copy the weights again")
    return names


def check_sizes(folder: Path) -> None:
    """Refuse a `config.json` that asks for far more than the weight files hold.

    Raises:
        RequestError: If it is damaged, or belongs to a larger model.
    """
    config = _object(folder / "config.json")
    tensors, weights = held_weights(folder)
    for values in (config, config.get("text_config")):
        for name, value in values.items() if isinstance(values, dict) else ():
            if isinstance(value, int | float) and value > _limit(name, tensors, weights):
                raise RequestError(
                    f"{str(folder / 'config.json')!r} has {name} {value}, the weight files hold {tensors} tensors with "
                    f"{weights:,} weights; the folder is incomplete or its config.json belongs to another model"
                )


def held_weights(folder: Path) -> tuple[int, int]:
    """How many tensors and weights the folder's safetensors files hold.

    Raises:
        RequestError: If a header is damaged.
    """
    held = [_weights(folder / name) for name in weight_files(folder)]
    return sum(tensors for tensors, _ in held), sum(weights for _, weights in held)


def check_gguf(path: Path) -> None:
    """Refuse a GGUF file whose header asks for more than the file holds.

    Raises:
        RequestError: If it is damaged or cut off.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            _Gguf(content).walk()
    except (ValueError, struct.error, RecursionError, OverflowError) as error:
        raise RequestError(f"GGUF file {str(path)!r} is damaged ({error}); copy it again") from error


def _limit(name: str, tensors: int, weights: int) -> float:
    """The largest value that a size can have: a layer has a tensor at least, a width a weight."""
    if name in ("num_hidden_layers", "n_layer", "num_layers", "n_layers"):
        return tensors
    is_size = name.endswith(("_size", "_dim", "_heads", "_inner")) or name in (
        "n_embd",
        "n_head",
        "n_positions",
    )
    return max(weights, 1) if is_size else math.inf


def _weights(path: Path) -> tuple[int, int]:
    """How many tensors and weights a safetensors file says it holds.

    Raises:
        RequestError: If its header is damaged.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > min(size, MOST_HEADER):
                raise ValueError(f"a header of {length:,} bytes in a file of {size:,}")
            entries = json.loads(file.read(length))
        tensors = [entry for name, entry in entries.items() if name != "__metadata__"]
        end = 8 + length + max((entry["data_offsets"][1] for entry in tensors), default=0)
        if end > size:
            raise ValueError(f"{size:,} of {end:,} bytes are there")
        shapes = [entry["shape"] for entry in tensors]
        return len(shapes), min(sum(math.prod(map(int, shape)) for shape in shapes), size)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise RequestError(
            f"the weights of {str(path.parent)!r} are damaged ({path.name}: {reason(error)}); copy them again"
        ) from error


def _object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RequestError(
            f"model folder {str(path.parent)!r} cannot be read ({path.name} is no JSON: {error}); copy it again"
        ) from error
    if not isinstance(found, dict):
        raise RequestError(
            f"model folder {str(path.parent)!r} cannot be read ({path.name} holds no JSON object); copy it again"
        )
    return found


def _texts(named: dict[str, Any]) -> bool:
    return all(isinstance(name, str) for name in named.values())


class _Gguf:
    """A walk over a GGUF header that reads lengths only, each checked against the file's size.

    Args:
        content: The whole file.
    """

    def __init__(self, content: mmap.mmap) -> None:
        self._content, self._at, self._order = content, 4, "<"

    def walk(self) -> None:
        """Pass over everything in front of the tensors' data."""
        version = self._number("I")
        if version & 0xFFFF == 0:  # the other byte order
            self._order = ">"
        tensors, keys = self._number("Q"), self._number("Q")
        for _ in range(self._count(keys, 12, "keys")):
            self._string()
            self._value(self._number("I"))
        for _ in range(self._count(tensors, 24, "tensors")):
            self._tensor()

    def _tensor(self) -> None:
        self._string()
        dimensions = self._number("I")
        if dimensions > MOST_DIMENSIONS:
            raise ValueError(f"a tensor has {dimensions} dimensions")
        weights = math.prod(self._number("Q") for _ in range(dimensions))
        self._number("I")
        offset = self._number("Q")
        if offset > len(self._content) or weights > MOST_WEIGHTS_PER_BYTE * len(self._content):
            raise ValueError(f"a tensor of {weights} weights at byte {offset} of {len(self._content)}")

    def _value(self, kind: int, depth: int = 0) -> None:
        if kind == _STRING:
            self._string()
        elif kind == _ARRAY and depth < 2:
            inner, length = self._number("I"), self._number("Q")
            if inner in _FIXED:
                self._skip(length * _FIXED[inner])
            else:
                for _ in range(self._count(length, 8, "values")):
                    self._value(inner, depth + 1)
        elif kind in _FIXED:
            self._skip(_FIXED[kind])
        else:
            raise ValueError(f"a value of kind {kind}")

    def _string(self) -> None:
        self._skip(self._number("Q"))

    def _count(self, number: int, least: int, what: str) -> int:
        if number * least > len(self._content) - self._at:
            raise ValueError(f"{number} {what} in the rest of {len(self._content)} bytes")
        return number

    def _number(self, form: str) -> int:
        (found,) = struct.unpack_from(self._order + form, self._content, self._at)
        self._at += struct.calcsize(form)
        return int(found)

    def _skip(self, length: int) -> None:
        if length > len(self._content) - self._at:
            raise ValueError(f"{length} bytes from byte {self._at} of {len(self._content)}")
        self._at += length
