"""The files behind a ledger row: what a batch wrote, and the edited matrices as they are now.

A batch file names a matrix `layer.4` if it is the down-projection, `layer.4.gate` or `layer.4.up` otherwise.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast, get_args

import torch
from jaxtyping import Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nmke.damage import read_as
from nmke.editors.pipeline import BatchResult
from nmke.editors.side import RowChanges
from nmke.errors import LedgerError
from nmke.models.cache import atomic_file
from nmke.types import Columns, Keys, MatrixPlace, Part

BATCH_SCHEMA = "nmke.batch/1"
HEAD_SCHEMA = "nmke.head/1"


@dataclass(frozen=True)
class Before:
    """What a batch overwrote.

    Args:
        columns: Columns of each edited matrix.
        side: Rows of side memories, by the tensors' names in files.
    """

    columns: Mapping[MatrixPlace, Columns]
    side: Mapping[str, RowChanges]


def write_batch(path: Path, result: BatchResult, before: Before) -> str:
    """Write keys, target values, update, mask and before-image of a batch.

    Returns:
        sha256 of the file.

    Raises:
        LedgerError: If it cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    for update in result.updates:
        prefix = f"layer.{update.layer}."
        tensors[prefix + "left"] = update.left
        tensors[prefix + "right"] = update.right
        if update.layer in result.memory_keys:
            tensors[prefix + "keys"] = result.memory_keys[update.layer]
        for part, columns in update.replaced.items():
            tensors[_name(MatrixPlace(update.layer, part)) + ".after"] = columns.values
        if update.mask is not None:
            tensors[prefix + "mask"] = update.mask.keep.to(torch.uint8)
    for layer, inputs in result.memory_inputs.items():
        tensors[f"layer.{layer}.inputs"] = inputs
    for place, columns in before.columns.items():
        tensors[_name(place) + ".columns"] = columns.index
        tensors[_name(place) + ".before"] = columns.values
    for layer, values in result.targets.values.items():
        tensors[f"layer.{layer}.target_values"] = values
    for name, change in before.side.items():
        tensors[f"{name}.length"] = torch.tensor(change.length)
        tensors[f"{name}.index"] = change.index
        tensors[f"{name}.rows"] = change.rows
    tensors["owners"] = torch.tensor(result.owners, dtype=torch.int32)
    return _write(path, tensors, {"schema": BATCH_SCHEMA})


def read_before(path: Path) -> Before:
    """The before-images of a batch."""
    tensors = _read(path, BATCH_SCHEMA, ("columns", "before", "length", "index", "rows"))
    with read_as(f"batch file {str(path)!r}"):
        places = sorted(_place(name) for name in tensors if name.endswith(".columns"))
        columns = {p: Columns(tensors[f"{_name(p)}.columns"], tensors[f"{_name(p)}.before"]) for p in places}
        side = [name.removesuffix(".length") for name in tensors if name.endswith(".length")]
        return Before(columns, {name: _row_changes(tensors, name) for name in side})


def _row_changes(tensors: Mapping[str, Tensor], name: str) -> RowChanges:
    return RowChanges(int(tensors[f"{name}.length"]), tensors[f"{name}.index"], tensors[f"{name}.rows"])


def read_rows(path: Path, edit: int | None = None) -> tuple[dict[int, Keys], dict[int, Keys]]:
    """What a batch is remembered by.

    Args:
        path: The batch's file.
        edit: Only the rows of this edit, counted among those the batch wrote; None for all rows.

    Returns:
        Per layer, the keys that it wrote [rows, d_mlp], and what MLPs are given at its subjects with a one behind it
        [rows, d_model + 1]; float32.
    """
    tensors = _read(path, BATCH_SCHEMA, ("keys", "inputs", "owners"))
    with read_as(f"batch file {str(path)!r}"):
        owners = tensors.pop("owners")
        kept = owners >= 0 if edit is None else owners == edit
        keys, inputs = (
            {
                int(name.split(".")[1]): rows[kept]
                for name, rows in tensors.items()
                if name.endswith(f".{kind}")
            }
            for kind in ("keys", "inputs")
        )
        return keys, inputs


def read_columns(path: Path) -> dict[int, tuple[Int[Tensor, " touched"], int]]:
    """Per layer, the neurons that a batch wrote into, and how many neurons the layer has."""
    indices: dict[int, list[Tensor]] = {}
    for name, index in _read(path, BATCH_SCHEMA, ("columns",)).items():
        with read_as(f"batch file {str(path)!r}"):
            indices.setdefault(_place(name).layer, []).append(index.long())
    with read_as(f"batch file {str(path)!r}"), safe_open(path, framework="pt") as file:
        return {
            layer: (torch.cat(parts).unique(), int(file.get_slice(f"layer.{layer}.right").get_shape()[1]))
            for layer, parts in indices.items()
        }


def write_head(path: Path, tensors: Mapping[str, Tensor], content_hash: str) -> str:
    """Write the edited matrices and side memories, by tensor name.

    Returns:
        sha256 of the file.
    """
    return _write(path, dict(tensors), {"schema": HEAD_SCHEMA, "content_hash": content_hash})


def read_head(path: Path) -> dict[str, Tensor]:
    """The edited matrices and side memories, by tensor name."""
    return _read(path, HEAD_SCHEMA, None)


def file_sha256(path: Path) -> str:
    """sha256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sync_folder(path: Path) -> None:
    """Have the names in a folder on the disk, so that a power cut cannot lose a file that the ledger names."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _name(place: MatrixPlace) -> str:
    """How the names of a matrix's tensors begin."""
    return f"layer.{place.layer}" + ("" if place.part == "down" else f".{place.part}")


def _place(name: str) -> MatrixPlace:
    """The matrix that a tensor of a batch file belongs to.

    Raises:
        LedgerError: If the name is none that this version writes.
    """
    _, layer, *part, _ = name.split(".")
    found = MatrixPlace(int(layer), cast(Part, part[0] if part else "down"))
    if found.part not in get_args(Part):
        raise LedgerError(f"a batch file holds {name!r}, which this version does not know; update nmke")
    return found


def _write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    try:
        with atomic_file(path) as temporary:
            plain = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
            save_file(plain, temporary, metadata=metadata)
            found = file_sha256(temporary)
        sync_folder(path.parent)
        return found
    except (OSError, SafetensorError) as error:
        raise LedgerError(
            f"{path.name} could not be written ({error}); nothing was changed: free disk space and run again "
            "with --resume"
        ) from error


def _read(path: Path, schema: str, wanted: tuple[str, ...] | None) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            found = (file.metadata() or {}).get("schema")
            if found != schema:
                raise LedgerError(
                    f"{path.name} has schema {found!r}, expected {schema!r}; the run folder is damaged"
                )
            names = [n for n in file.keys() if wanted is None or n.rsplit(".", 1)[-1] in wanted]  # noqa: SIM118
            return {name: file.get_tensor(name) for name in names}
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise LedgerError(
            f"{str(path)!r} is missing or damaged ({error}); restore the run from a backup"
        ) from error


@dataclass(frozen=True)
class LayerWrite:
    """What one batch wrote into one layer.

    Args:
        left: Float tensor [d_model, rows].
        right: Float tensor [rows, d_mlp]; ΔW = left @ right.
        keys: Keys after the write, [rows, d_mlp].
        owners: For each row, the edit it belongs to, counted among those the batch wrote.
        before: The changed columns of the down-projection as they were.
        mask: Neurons that were allowed to change, [d_mlp]; None when all were.
        after: What took the place of these columns, [d_model, touched], in the order of rows; None where ΔW was added.
    """

    left: Tensor
    right: Tensor
    keys: Keys
    owners: Tensor
    before: Columns
    mask: Tensor | None
    after: Tensor | None = None

    @property
    def delta(self) -> Tensor:
        """Change of the down-projection, [d_model, d_mlp] float64."""
        if self.after is None:
            return self.left.double() @ self.right.double()
        return self._spread(self.after.double() - self.before.values.double())

    def of_edit(self, edit: int) -> Tensor:
        """One edit's part of `delta`, [d_model, d_mlp] float64."""
        mine = self.owners == edit
        if self.after is None:
            return self.left[:, mine].double() @ self.right[mine].double()
        return self._spread((self.after.double() - self.before.values.double()) * mine)

    def column_norms(self, edit: int) -> Tensor:
        """Norm of each column of `of_edit`, [d_mlp], without forming it from its factors."""
        if self.after is not None:
            return self.of_edit(edit).norm(dim=0)
        mine = self.owners == edit
        left, right = self.left[:, mine].double(), self.right[mine].double()
        return (right * (left.T @ left @ right)).sum(dim=0).clamp(min=0).sqrt()

    def _spread(self, columns: Tensor) -> Tensor:
        whole = columns.new_zeros(len(columns), self.right.shape[1])
        whole[:, self.before.index.long()] = columns
        return whole


def read_writes(path: Path) -> dict[int, LayerWrite]:
    """What a batch wrote, per layer."""
    tensors = _read(path, BATCH_SCHEMA, None)
    with read_as(f"batch file {str(path)!r}"):
        layers = sorted({int(name.split(".")[1]) for name in tensors if name.endswith(".left")})
        return {layer: _layer_write(tensors, layer) for layer in layers}


def _layer_write(tensors: Mapping[str, Tensor], layer: int) -> LayerWrite:
    names = [n for n in tensors if n.startswith(f"layer.{layer}.") and n.count(".") == 2]
    part = {name.rsplit(".", 1)[1]: tensors[name] for name in names}
    before = Columns(part["columns"], part["before"])
    mask = part["mask"].bool() if "mask" in part else None
    content = (part["left"], part["right"], part["keys"], tensors["owners"], before, mask)
    return LayerWrite(*content, part.get("after"))
