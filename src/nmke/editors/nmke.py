"""NMKE: neuron-specific masked knowledge editing.

Source: Liu et al. 2025, arXiv:2510.22139. The mask comes from attribution (see `nmke.masking`); this file
composes it with a solver. `nmke` solves on the selected neurons alone (in-solve placement: the residual is met
as well as the selected columns allow); `nmke-published` zeroes the other rows of AlphaEdit's solution, as the
paper does.
Differs (`nmke`): mask inside the solve; ties in the general ranking broken by the mean score; neurons scored by
their coefficient (the paper's MPC) at the subject's last token, where the key is written: on the default model a
mask by log-probability increase at the prompt's last token does no better than a random one of equal size.
`nmke-published` keeps the paper's scores, formulas and constants, read at the last real token.
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
    "nmke",
    Method(
        Nmke(),
        defaults={
            "mask": "entropy",
            "placement": "in-solve",
            "attribution": "mpc",
            "attribution_token": "subject",
            "covariance_weight": 300.0,
            "l2": 1.0,
        },
    ),
    source="arXiv:2510.22139",
    summary="attributed neurons only, solved on those neurons",
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
