"""The edited matrices of a model against their base: hash, swap, restore.

Only the matrices of MLPs are ever edited, so the base is kept for those that were touched and nothing else. Each
has one column per neuron, whatever its module's own layout is. What a method keeps beside them is in `side`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from nmke.batch_file import Before
from nmke.editors.side import PREFIX, SideMemory, unflatten
from nmke.errors import LayoutError, LedgerError
from nmke.models.load import EditableModel
from nmke.models.updates import matrix_at, put_back, write_update, written_places
from nmke.models.weights import DownProjection, NeuronMatrix, swapped_in
from nmke.side_state import SideState
from nmke.types import Columns, LayerUpdate, MatrixPlace, Part


@dataclass(frozen=True)
class ChangedTensor:
    """One weight tensor that differs from the base.

    Args:
        name: Its name in the model's state dict.
        layer: Decoder layer.
        columns: How many neurons' columns differ.
        of: Neurons of the layer.
        part: Which of the layer's matrices it is.
    """

    name: str
    layer: int
    columns: int
    of: int
    part: Part = "down"

    @property
    def place(self) -> MatrixPlace:
        """Layer and part."""
        return MatrixPlace(self.layer, self.part)


class WeightsState:
    """Owner of the model's weights while a session is open: the only place that writes them.

    Args:
        model: The unedited model.
    """

    def __init__(self, model: EditableModel) -> None:
        self.model = model
        self._base = model.unedited  # a later session on the same model finds what an earlier one changed
        self._fingerprint = model.fingerprint  # of the weights as loaded, before any edit
        self.side = SideState(model)

    def projection(self, layer: int) -> DownProjection:
        """The down-projection of `layer`; its base is kept from the first call on."""
        self.matrix(MatrixPlace(layer))
        return DownProjection(self.model.layout.layers[layer].down_proj)

    def matrix(self, place: MatrixPlace) -> NeuronMatrix:
        """One of a layer's matrices; its base is kept from the first call on.

        Raises:
            LayoutError: If the layer has no such part.
        """
        found = matrix_at(self.model.layout, place)
        if place not in self._base:
            self._base[place] = found.read().detach().clone()
        return found

    def tensor_name(self, place: MatrixPlace) -> str:
        """Name of a matrix's weight in the state dict; a bias goes with it."""
        return f"{self.model.layout.layers[place.layer].linear(place.part)[1]}.weight"

    def place_of(self, name: str) -> MatrixPlace | None:
        """The matrix of that name, None where this model has none."""
        for parts in self.model.layout.layers:
            if name == f"{parts.down_proj_name}.weight":
                return MatrixPlace(parts.index)
            if name.startswith(f"{parts.block_name}."):
                reading = self._reading_places(parts.index)
                return next((place for place in reading if self.tensor_name(place) == name), None)
        return None

    def _reading_places(self, layer: int) -> list[MatrixPlace]:
        try:
            gated = self.model.layout.layers[layer].read_in.gate is not None
        except LayoutError:
            return []
        return [MatrixPlace(layer, "up"), *([MatrixPlace(layer, "gate")] if gated else [])]

    def apply(self, updates: Sequence[LayerUpdate], side: SideMemory | None = None) -> Before:
        """Write a batch, all layers and the side memory or nothing.

        Args:
            updates: One per layer.
            side: The memory that takes its kind's place, None to leave side memories alone.

        Returns:
            What was overwritten.

        Raises:
            NumericsError: If a written weight is not finite; then everything is as before.
        """
        before: dict[MatrixPlace, Columns] = {}
        try:
            for update in updates:
                for place in written_places(update):
                    self.matrix(place)
                before |= write_update(self.model.layout, update)
            return Before(before, {} if side is None else self.side.commit(side))
        except BaseException:
            self.restore(before)
            raise

    def take_back(self, before: Before) -> None:
        """Undo an `apply`, bit for bit."""
        self.restore(before.columns)
        if before.side:
            self.side.take_back(before.side)

    def restore(self, columns: Mapping[MatrixPlace, Columns]) -> None:
        """Put columns back, bit for bit."""
        for place in columns:
            self.matrix(place)
        put_back(self.model.layout, columns)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace whole matrices by name, and all side memories, as a head file holds them.

        Raises:
            LedgerError: If a tensor is not one of this model's MLP matrices.
        """
        side = {name: tensor for name, tensor in tensors.items() if name.startswith(PREFIX)}
        for name, matrix in tensors.items():
            if name in side:
                continue
            place = self.place_of(name)
            if place is None or self.matrix(place).read().shape != matrix.shape:
                raise LedgerError(
                    f"tensor {name!r} is no MLP matrix of this model that edits write; the run has another base"
                )
            self.restore({place: _whole(matrix)})
        self.side.install(unflatten({n: t.to(self.model.device) for n, t in side.items()}))

    def reset(self) -> None:
        """Put every touched matrix back to the base, and forget side memories."""
        self.side.install({})
        self.restore({place: _whole(self._base[place]) for place in self._changed()})

    def matrices(self) -> dict[str, Tensor]:
        """Every matrix that differs from the base, [rows, d_mlp], by name; not cloned."""
        return {self.tensor_name(place): self.matrix(place).read() for place in self._changed()}

    def before_and_after(self, place: MatrixPlace) -> tuple[Tensor, Tensor]:
        """A matrix in the base and as it is now, [rows, d_mlp]; neither is cloned."""
        now = self.matrix(place).read()
        return self._base[place], now

    def head(self) -> dict[str, Tensor]:
        """What a head file holds: `matrices`, and the tensors of side memories; not cloned."""
        return {**self.matrices(), **self.side.tensors()}

    def changed(self) -> list[ChangedTensor]:
        """What differs from the base."""
        found = []
        for place in self._changed():
            base, now = self.before_and_after(place)
            columns = int((now != base).any(dim=0).sum())
            found.append(
                ChangedTensor(self.tensor_name(place), place.layer, columns, now.shape[1], place.part)
            )
        return found

    def drift(self) -> dict[int, float]:
        """‖W - W_base‖ / ‖W_base‖ of every down-projection that differs from the base.

        What neurons read is left out: a row that tells one subject from all else is large by its steepness, which says
        nothing about how far the model is from what it was.
        """
        found: dict[int, float] = {}
        for place, base in sorted(self._base.items()):
            if place.part == "down":
                before = base.float()
                found[place.layer] = float(
                    (self.matrix(place).read().float() - before).norm() / before.norm()
                )
        return {layer: share for layer, share in found.items() if share > 0}

    def content_hash(self) -> str:
        """Hash of the edited model: the base's fingerprint, each tensor that differs from it, what is recalled."""
        digest = hashlib.sha256(self._fingerprint.encode())
        recalled = self.side.tensors(recalled=True)
        for name, matrix in sorted({**self.matrices(), **recalled}.items()):
            digest.update(f"|{name}|{matrix.dtype}|{tuple(matrix.shape)}|".encode())
            flat = matrix.detach().cpu().contiguous().flatten()
            digest.update(flat.view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def base_hash(self) -> str:
        """`content_hash` of the unedited model."""
        return hashlib.sha256(self._fingerprint.encode()).hexdigest()

    @contextmanager
    def base(self) -> Iterator[None]:
        """The unedited model inside the `with`: the touched matrices are swapped, nothing is recalled."""
        touched = [(self.matrix(place), self._base[place]) for place in self._changed()]
        with self.side.off(), swapped_in(touched):
            yield

    def _changed(self) -> list[MatrixPlace]:
        return [
            place
            for place, base in sorted(self._base.items())
            if not torch.equal(base, matrix_at(self.model.layout, place).read())
        ]


def _whole(matrix: Tensor) -> Columns:
    """All columns of a matrix."""
    return Columns(torch.arange(matrix.shape[1], dtype=torch.int32), matrix)
