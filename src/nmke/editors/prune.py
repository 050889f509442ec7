"""PRUNE: hold the singular values of the accumulated update below those of the weights.

Source: Ma et al. 2024, arXiv:2405.16821: the sum of all updates ΔW = Σ σᵢ uᵢ vᵢᵀ is replaced by Σ F(σᵢ) uᵢ vᵢᵀ with
F(σ) = log_α(σ) − log_α(σ̂) + σ̂ for σ > σ̂, else σ; σ̂ is the largest singular value of the unedited weights. On top
of MEMIT.
Differs: applied after every batch, so that the model is restrained whenever it is looked at; the paper applies it
once, behind the last edit. α = 1.2 could not be confirmed from the paper's text.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from nmke.editors.memit import PUBLISHED, CovarianceSolver
from nmke.editors.method import STATISTICS, Method, methods
from nmke.editors.stabilisers import Stabiliser, Weights, dense_update, stabilisers
from nmke.types import LayerUpdate

SOURCE = "arXiv:2405.16821"


@dataclass(frozen=True)
class Restraint:
    """Compresses the large singular values of everything written so far.

    Args:
        alpha: Base of the logarithm, above 1; the larger, the stronger.
    """

    alpha: float = 1.2

    def __call__(self, update: LayerUpdate, now: Weights, base: Weights) -> LayerUpdate:
        """See `Filter`; an update that stays below the limit is left as it is."""
        written = now.double() - base.double()
        total = written + update.left.double() @ update.right.double()
        left, values, right = torch.linalg.svd(total, full_matrices=False)
        limit = torch.linalg.matrix_norm(base.double(), ord=2)
        if not bool((values > limit).any()):
            return update
        pressed = (values.log() - limit.log()) / math.log(self.alpha) + limit
        restrained = (left * torch.where(values > limit, pressed, values)) @ right
        return dense_update(update, restrained - written)


stabilisers.register(
    "prune",
    Stabiliser(filter=Restraint(), mixes_neurons=True),
    source=SOURCE,
    summary="hold the singular values of everything written below those of the weights",
    doc=__doc__,
)
methods.register(
    "prune",
    Method(
        CovarianceSolver(remember=False),
        defaults=PUBLISHED,
        remembers=False,
        stabilisers=("prune",),
    ),
    source=SOURCE,
    summary="MEMIT, with the accumulated update's singular values restrained",
    needs=(STATISTICS,),
    doc=__doc__,
)
