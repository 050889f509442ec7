"""SPHERE: damp an update along the principal directions of the weights.

Source: Liu et al. 2025, arXiv:2510.01172: ΔW (I − α U Uᵀ), where U holds the eigenvectors of WᵀW/n with the largest
eigenvalues, as few as sum to a share η of the trace; α = 0.5, η = 0.5 on AlphaEdit (0.8 on MEMIT).
Differs: α = 0.5 for every method. W is the weights before the batch; whether its rows are normalised first could
not be confirmed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from nmke.editors.stabilisers import Stabiliser, Weights, principal_directions, stabilisers
from nmke.types import LayerUpdate


@dataclass(frozen=True)
class Sphere:
    """Damps the part of an update that reads principal directions.

    Args:
        strength: α; 1 removes that part.
        share: η, share of the trace that the principal directions hold.
    """

    strength: float = 0.5
    share: float = 0.5

    def __call__(self, update: LayerUpdate, now: Weights, base: Weights) -> LayerUpdate:
        """See `Filter`; the rank stays what it was."""
        _, principal = principal_directions(now, self.share)
        right = update.right.double()
        damped = right - self.strength * (right @ principal) @ principal.T
        return replace(update, right=damped.float())


stabilisers.register(
    "sphere",
    Stabiliser(filter=Sphere(), mixes_neurons=True),
    source="arXiv:2510.01172",
    summary="damp the update along the weights' principal directions",
    doc=__doc__,
)
