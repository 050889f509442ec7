"""NMKE: neuron-specific masked knowledge editing.

Source: Liu et al. 2025, arXiv:2510.22139. Neurons are scored for the facts at hand, entropy decides how many are
kept (see `nmke.masking`), and only these are written.
Differs (`nmke`): every edit of a batch has its own mask, 7 or 8 % of the neurons, chosen where its key is
written and by what it takes to write it (`nmke.masking.per_edit`); the residual is met inside the mask
(`nmke.editors.per_edit`); targets are optimised at the down-projections of all edited layers together. One mask
for a whole batch, as in the paper, remains: ask for `mask_scope` "batch", or for a mask or score that only a batch
has. It is then solved on the selected neurons alone, scored by their coefficient at the subject's last token,
and ties in the general ranking are broken by the mean score.
`nmke-published` keeps the paper's scores, formulas and constants, read at the last real token, and zeroes the
other rows of AlphaEdit's solution, as the paper does.
"""

from __future__ import annotations

from dataclasses import dataclass

from nmke.config import EditConfig
from nmke.editors.alphaedit import AlphaEdit
from nmke.editors.memit import CovarianceSolver
from nmke.editors.memory import KeyMemory
from nmke.editors.method import STATISTICS, Directions, Method, methods
from nmke.stats.covariance import LayerStats
from nmke.types import Keys, Mask


@dataclass(frozen=True)
class Nmke:
    """The solver that goes with the placement of the mask."""

    def directions(
        self, keys: Keys, stats: LayerStats, memory: KeyMemory, keep: Mask | None, config: EditConfig
    ) -> Directions:
        """See `Solver.directions`."""
        solver = AlphaEdit() if config.placement == "after-solve" else CovarianceSolver(remember=True)
        return solver.directions(keys, stats, memory, keep, config)


methods.register(
    "nmke-linear",
    Method(
        Nmke(),
        defaults={
            "mask": "entropy",
            "mask_scope": "edit",
            "attribution": "write",
            "targets": "joint",
            "lr": 0.2,
            "stop_loss": 0.15,
            "covariance_weight": 300.0,
            "l2": 1.0,
        },
        edit_masks=True,
        batch_defaults={
            "mask_scope": "batch",
            "attribution": "mpc",
            "attribution_token": "subject",
            "targets": "auto",
            "lr": 0.5,
            "stop_loss": 0.05,
        },
    ),
    source="arXiv:2510.22139",
    summary="each edit written into its own few neurons, its residual met there",
    needs=(STATISTICS,),
    doc=__doc__,
)
methods.register(
    "nmke-published",
    Method(
        Nmke(),
        defaults={"mask": "entropy", "placement": "after-solve", "covariance_weight": 1_000.0, "l2": 10.0},
    ),
    source="arXiv:2510.22139",
    summary="AlphaEdit's update with the columns of unselected neurons zeroed, as published",
    needs=(STATISTICS,),
    doc=__doc__,
)
