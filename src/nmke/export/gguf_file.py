"""A copy of a GGUF file with some tensors replaced by plain floats and everything else bit for bit as it was.

The file: magic, version, counts; metadata; one entry per tensor (name, sizes, type, offset); the data, each
tensor aligned. Metadata is copied as raw bytes, never decoded and encoded again.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from nmke.errors import ExportError

if TYPE_CHECKING:
    from gguf import GGUFReader

_FIRST_KEY = 24  # magic and version, 4 bytes each; number of tensors and of keys, 8 bytes each


def open_gguf(path: Path) -> GGUFReader:
    """The file's reader; its data stays on disk.

    Raises:
        ExportError: If it is damaged, or one part of several.
    """
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise ExportError(f"GGUF file {str(path)!r} cannot be read ({error}); copy it again") from error
    if "split.count" in reader.fields and int(reader.fields["split.count"].contents()) > 1:
        raise ExportError(
            f"GGUF file {str(path)!r} is one of several parts; join them with llama.cpp's `llama-gguf-split --merge`"
        )
    return reader


def dequantised(reader: GGUFReader, name: str) -> np.ndarray[Any, np.dtype[np.float32]] | None:
    """A tensor as float32 in its own shape, rows first, or None if the file has none of that name."""
    from gguf import dequantize

    tensor = next((t for t in reader.tensors if t.name == name), None)
    return None if tensor is None else dequantize(tensor.data, tensor.tensor_type)


def write_patched(reader: GGUFReader, path: Path, replaced: Mapping[str, np.ndarray[Any, Any]]) -> None:
    """Write the file with other content for some tensors.

    Args:
        reader: The original.
        path: Where the copy goes.
        replaced: New content by tensor name, float32 or float16, in the original's shape.
    """
    from gguf import GGMLQuantizationType

    types = {"float32": GGMLQuantizationType.F32, "float16": GGMLQuantizationType.F16}
    alignment = int(reader.alignment)  # numpy's unsigned type cannot be negated
    with path.open("wb") as file:
        file.write(reader.data[: _metadata_end(reader)].tobytes())
        offset = 0
        for tensor in reader.tensors:
            length, name, n_sizes, sizes, old_type, old_offset = tensor.field.parts
            new = replaced.get(tensor.name)
            kind = int(tensor.tensor_type) if new is None else int(types[str(new.dtype)])
            entry = (length, name, n_sizes, sizes, np.array([kind], old_type.dtype))
            file.write(b"".join(part.tobytes() for part in (*entry, np.array([offset], old_offset.dtype))))
            size = tensor.n_bytes if new is None else new.nbytes
            offset += size + -size % alignment
        _align(file, alignment)
        for tensor in reader.tensors:
            content = replaced.get(tensor.name, tensor.data)
            np.ascontiguousarray(content).tofile(file)
            _align(file, alignment)


def differing(first: GGUFReader, second: GGUFReader) -> list[str]:
    """Names of tensors that differ in type, sizes or any bit, and "metadata" if that does."""
    found = []
    start, ends = 8, (_metadata_end(first), _metadata_end(second))  # behind magic and version
    if not np.array_equal(first.data[start : ends[0]], second.data[start : ends[1]]):
        found.append("metadata")
    pairs = {t.name: t for t in second.tensors}
    for tensor in first.tensors:
        other = pairs.pop(tensor.name, None)
        same = other is not None and other.tensor_type == tensor.tensor_type
        if not same or not np.array_equal(_bytes(tensor.data), _bytes(other.data)):
            found.append(tensor.name)
    return [*found, *pairs]


def _metadata_end(reader: GGUFReader) -> int:
    """Where the first tensor's entry begins."""
    return int(reader.tensors[0].field.offset) if reader.tensors else _FIRST_KEY


def _bytes(data: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return data.reshape(-1).view(np.uint8)


def _align(file: BinaryIO, alignment: int) -> None:
    file.write(bytes(-file.tell() % alignment))
