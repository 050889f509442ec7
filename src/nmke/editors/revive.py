"""REVIVE: drop what an update does to the dominant singular subspace of the weights.

Source: Zhang et al. 2026, arXiv:2601.11042: with W = Σ σᵢ uᵢ vᵢᵀ and ΔW = Σ αᵢⱼ uᵢ vⱼᵀ, every term with i ≤ k or j ≤ k
is dropped; k is the smallest number of singular values that hold a share τ of the energy. That is
(I − U_k U_kᵀ) ΔW (I − V_k V_kᵀ).
Differs: energy is read as the sum of σ²; τ = 0.5, which could not be confirmed (the paper finds it not to matter much).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from nmke.editors.stabilisers import Stabiliser, Weights, principal_directions, stabilisers
from nmke.types import LayerUpdate


@dataclass(frozen=True)
class Revive:
    """Projects an update off the dominant input and output directions of the unedited weights.

    Args:
        share: τ, share of the energy that is protected.
    """

    share: float = 0.5

    def __call__(self, update: LayerUpdate, now: Weights, base: Weights) -> LayerUpdate:
        """See `Filter`; the rank stays what it was."""
        outputs, inputs = principal_directions(base, self.share)
        left, right = update.left.double(), update.right.double()
        left = left - outputs @ (outputs.T @ left)
        right = right - (right @ inputs) @ inputs.T
        return replace(update, left=left.float(), right=right.float())


stabilisers.register(
    "revive",
    Stabiliser(filter=Revive(), mixes_neurons=True),
    source="arXiv:2601.11042",
    summary="drop what the update does to the dominant singular subspace",
    doc=__doc__,
)
