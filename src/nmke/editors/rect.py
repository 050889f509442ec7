"""RECT: keep only the entries of an update that change their weight most in proportion.

Source: Gu et al. 2024, arXiv:2401.04700: with δ = |ΔW / W| entry by entry, the k % of entries with the largest δ
keep their value, the others become 0. On top of MEMIT.
Differs: k = 40 could not be confirmed from the paper's text. The mask is over entries, so that the update has full
rank and is stored dense.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nmke.editors.memit import PUBLISHED, CovarianceSolver
from nmke.editors.method import STATISTICS, Method, methods
from nmke.editors.stabilisers import Stabiliser, Weights, dense_update, stabilisers
from nmke.types import LayerUpdate

SOURCE = "arXiv:2401.04700"


@dataclass(frozen=True)
class RelativeChange:
    """Zeroes the entries of an update whose relative change is small.

    Args:
        share: Share of entries that keep their value.
    """

    share: float = 0.4

    def __call__(self, update: LayerUpdate, now: Weights, base: Weights) -> LayerUpdate:
        """See `Filter`; ties at the limit are kept."""
        delta = update.left.double() @ update.right.double()
        relative = delta.abs() / now.double().abs().clamp(min=torch.finfo(torch.float32).tiny)
        kept = max(1, round(self.share * delta.numel()))
        limit = relative.flatten().kthvalue(delta.numel() - kept + 1).values
        return dense_update(update, delta.where(relative >= limit, 0.0))


stabilisers.register(
    "rect",
    Stabiliser(filter=RelativeChange()),
    source=SOURCE,
    summary="keep the 40 % of entries that change most in proportion",
    doc=__doc__,
)
methods.register(
    "rect",
    Method(
        CovarianceSolver(remember=False),
        defaults=PUBLISHED,
        remembers=False,
        stabilisers=("rect",),
    ),
    source=SOURCE,
    summary="MEMIT, keeping the entries that change most in proportion",
    needs=(STATISTICS,),
    doc=__doc__,
)
