"""What a run changed, tensor by tensor, and how far two sets of logits are apart: shared by the compact formats."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nmke.session import EditSession
from nmke.types import MatrixPlace

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Change:
    """One MLP matrix that differs from the base.

    Args:
        place: Decoder layer and part.
        module: Path of the linear layer in the model.
        name: Name of its weight in the state dict.
        base, edited: The matrix without and with the edits, one column per neuron, in the model's own type;
            [d_model, d_mlp], and a last row if it is a reading matrix with a bias.
        with_bias: Whether there is that row.
    """

    place: MatrixPlace
    module: str
    name: str
    base: Float[Tensor, "rows d_mlp"]
    edited: Float[Tensor, "rows d_mlp"]
    with_bias: bool = False

    @property
    def reads(self) -> bool:
        """Whether neurons read through it: its module's weight is then the transpose."""
        return self.place.part != "down"

    @property
    def columns(self) -> Int[Tensor, " touched"]:
        """The neurons whose columns differ in any bit, ascending."""
        bits = _BITS[self.base.itemsize]  # compared as integers: 0.0 and -0.0 are two things
        return (self.edited.view(bits) != self.base.view(bits)).any(dim=0).nonzero().squeeze(1)


def changes(session: EditSession) -> list[Change]:
    """Every changed matrix with its base, first layer to last; copies, so later writes do not reach them."""
    weights = session.weights
    found = []
    for changed in session.changed():
        base, edited = (matrix.clone() for matrix in weights.before_and_after(changed.place))
        module = changed.name.removesuffix(".weight")
        with_bias = len(base) > session.model.layout.d_model
        found.append(Change(changed.place, module, changed.name, base, edited, with_bias))
    return found


def logits_apart(first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
    """Largest absolute difference of two lists of logits; NaN if either holds one."""
    return float(torch.stack([(a - b).abs().max() for a, b in zip(first, second, strict=True)]).max())
