"""NSE: write into the most active neurons, for target values found on the unedited model.

Source: Jiang et al. 2024, arXiv:2410.04045: neurons are chosen by activation at the subject, the strongest that make
up a share p of the total; on these, ΔWᵀ = (w0·C0 + K Kᵀ)⁻¹ K Rᵀ; target values come from the original weights.
Differs: one choice of neurons per layer and batch, by the mean |k| over its edits; p = 0.8 could not be confirmed.
The layers are gone through once; the paper repeats until the values are reached.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nmke.config import EditConfig
from nmke.editors.memit import PUBLISHED, CovarianceSolver
from nmke.editors.memory import KeyMemory
from nmke.editors.method import STATISTICS, Directions, Method, methods
from nmke.stats.covariance import LayerStats
from nmke.types import Keys, Mask


@dataclass(frozen=True)
class NeuronLevel:
    """MEMIT's system on the most active neurons.

    Args:
        share: Share of the summed mean activation that the chosen neurons make up.
    """

    share: float = 0.8

    def directions(
        self, keys: Keys, stats: LayerStats, memory: KeyMemory, keep: Mask | None, config: EditConfig
    ) -> Directions:
        """See `Solver.directions`; a mask narrows the choice further."""
        chosen = most_active(keys, self.share)
        chosen = chosen if keep is None else chosen & keep
        return CovarianceSolver(remember=False).directions(keys, stats, memory, chosen, config)


def most_active(keys: Keys, share: float) -> Mask:
    """The fewest neurons whose mean |key| sums to `share` of the total; ties go to the lower index."""
    strength = keys.abs().mean(dim=0)
    order = strength.argsort(descending=True, stable=True)
    total = strength[order].cumsum(0)
    kept = int((total < share * total[-1]).sum()) + 1
    mask = torch.zeros(len(strength), dtype=torch.bool, device=keys.device)
    mask[order[:kept]] = True
    return mask


methods.register(
    "nse",
    Method(
        NeuronLevel(),
        defaults=PUBLISHED,
        remembers=False,
        targets_on="unedited",
    ),
    source="arXiv:2410.04045",
    summary="MEMIT on the most active neurons, with target values from the unedited model",
    needs=(STATISTICS,),
    doc=__doc__,
)
