"""The edited matrices of a model against their base: hash, swap, restore.

Only down-projections are ever edited, so the base is kept for the layers that were touched and nothing else.
What a method keeps beside them is in `side`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from nmke.batch_file import Before, Columns
from nmke.editors.side import PREFIX, SideMemory, unflatten
from nmke.errors import LedgerError
from nmke.models.load import EditableModel
from nmke.models.weights import DownProjection, swapped_in
from nmke.side_state import SideState
from nmke.types import LayerUpdate


@dataclass(frozen=True)
class ChangedTensor:
    """One weight tensor that differs from the base.

    Args:
        name: Its name in the model's state dict.
        layer: Decoder layer.
        columns: How many neurons' columns differ.
        of: Neurons of the layer.
    """

    name: str
    layer: int
    columns: int
    of: int


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
        found = DownProjection(self.model.layout.layers[layer].down_proj)
        if layer not in self._base:
            self._base[layer] = found.read().detach().clone()
        return found

    def tensor_name(self, layer: int) -> str:
        """Name of the layer's down-projection weight in the state dict."""
        return f"{self.model.layout.layers[layer].down_proj_name}.weight"

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
        before: dict[int, Columns] = {}
        try:
            for update in updates:
                projection = self.projection(update.layer)
                index = update.columns.nonzero().squeeze(1)
                before[update.layer] = Columns(index.to(torch.int32).cpu(), projection.columns(index))
                projection.add(update.left, update.right)
            return Before(before, {} if side is None else self.side.commit(side))
        except BaseException:
            self.restore(before)
            raise

    def take_back(self, before: Before) -> None:
        """Undo an `apply`, bit for bit."""
        self.restore(before.columns)
        if before.side:
            self.side.take_back(before.side)

    def restore(self, columns: Mapping[int, Columns]) -> None:
        """Put columns back, bit for bit."""
        for layer, saved in columns.items():
            projection = self.projection(layer)
            weight = projection.read()
            projection.restore(saved.index.long().to(weight.device), saved.values.to(weight.device))

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace whole down-projections by name, and all side memories, as a head file holds them.

        Raises:
            LedgerError: If a tensor is not one of this model's down-projections.
        """
        layers = {self.tensor_name(parts.index): parts.index for parts in self.model.layout.layers}
        side = {name: tensor for name, tensor in tensors.items() if name.startswith(PREFIX)}
        for name, matrix in tensors.items():
            if name in side:
                continue
            if name not in layers or self.projection(layers[name]).read().shape != matrix.shape:
                raise LedgerError(
                    f"tensor {name!r} is no down-projection of this model; the run has another base"
                )
            everything = torch.arange(matrix.shape[1])
            self.restore({layers[name]: Columns(everything, matrix)})
        self.side.install(unflatten({n: t.to(self.model.device) for n, t in side.items()}))

    def reset(self) -> None:
        """Put every touched down-projection back to the base, and forget side memories."""
        self.side.install({})
        for layer in self._changed():
            everything = torch.arange(self._base[layer].shape[1])
            self.restore({layer: Columns(everything, self._base[layer])})

    def matrices(self) -> dict[str, Tensor]:
        """Every down-projection that differs from the base, [d_model, d_mlp], by name; not cloned."""
        return {self.tensor_name(i): self.projection(i).read() for i in self._changed()}

    def before_and_after(self, layer: int) -> tuple[Tensor, Tensor]:
        """A layer's down-projection in the base and as it is now, [d_model, d_mlp]; neither is cloned."""
        now = self.projection(layer).read()
        return self._base[layer], now

    def head(self) -> dict[str, Tensor]:
        """What a head file holds: `matrices`, and the tensors of side memories; not cloned."""
        return {**self.matrices(), **self.side.tensors()}

    def changed(self) -> list[ChangedTensor]:
        """What differs from the base."""
        found = []
        for layer in self._changed():
            now = self.projection(layer).read()
            columns = int((now != self._base[layer]).any(dim=0).sum())
            found.append(ChangedTensor(self.tensor_name(layer), layer, columns, now.shape[1]))
        return found

    def drift(self) -> dict[int, float]:
        """‖W - W_base‖ / ‖W_base‖ per touched layer."""
        found = {}
        for layer, base in sorted(self._base.items()):
            now = self.projection(layer).read()
            found[layer] = float((now.float() - base.float()).norm() / base.float().norm())
        return found

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
        """The unedited model inside the `with`: the touched down-projections are swapped, nothing is recalled."""
        touched = {i: (self.projection(i), self._base[i]) for i in self._changed()}
        with self.side.off(), swapped_in(touched):
            yield

    def _changed(self) -> list[int]:
        return [
            layer
            for layer, base in sorted(self._base.items())
            if not torch.equal(base, DownProjection(self.model.layout.layers[layer].down_proj).read())
        ]
