"""What a run changed, tensor by tensor, and how far two sets of logits are apart: shared by the compact formats."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nmke.session import EditSession

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Change:
    """One down-projection that differs from the base.

    Args:
        layer: Decoder layer.
        module: Path of the linear layer in the model.
        name: Name of its weight in the state dict.
        base, edited: The matrix without and with the edits, [d_model, d_mlp], in the model's own type.
    """

    layer: int
    module: str
    name: str
    base: Float[Tensor, "d_model d_mlp"]
    edited: Float[Tensor, "d_model d_mlp"]

    @property
    def columns(self) -> Int[Tensor, " touched"]:
        """The neurons whose columns differ in any bit, ascending."""
        bits = _BITS[self.base.itemsize]  # compared as integers: 0.0 and -0.0 are two things
        return (self.edited.view(bits) != self.base.view(bits)).any(dim=0).nonzero().squeeze(1)


def changes(session: EditSession) -> list[Change]:
    """Every changed matrix with its base, first layer to last; copies, so later writes do not reach them."""
    names = {changed.layer: changed.name for changed in session.changed()}
    edited = {layer: session.weights.projection(layer).read().clone() for layer in names}
    with session.base():
        base = {layer: session.weights.projection(layer).read().clone() for layer in names}
    parts = session.model.layout.layers
    return [Change(i, parts[i].down_proj_name, names[i], base[i], edited[i]) for i in sorted(names)]


def logits_apart(first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
    """Largest absolute difference of two lists of logits; NaN if either holds one."""
    return float(torch.stack([(a - b).abs().max() for a, b in zip(first, second, strict=True)]).max())
