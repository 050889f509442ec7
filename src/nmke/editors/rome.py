"""ROME: a rank-one write of one fact into one layer.

Source: Meng et al. 2022, arXiv:2202.05262, eq. 2: ΔW = (v* − W k) (C⁻¹k)ᵀ / (kᵀ C⁻¹ k).
Differs: the value is optimised like MEMIT's (same targets for every method), at the edited layer.
"""

from __future__ import annotations

from dataclasses import dataclass

from nmke.config import EditConfig
from nmke.editors.memory import KeyMemory
from nmke.editors.method import STATISTICS, Directions, Method, methods
from nmke.editors.solve import solve_positive
from nmke.stats.covariance import LayerStats
from nmke.types import Keys, Mask


@dataclass(frozen=True)
class Rome:
    """One equality-constrained write."""

    def directions(
        self, keys: Keys, stats: LayerStats, memory: KeyMemory, keep: Mask | None, config: EditConfig
    ) -> Directions:
        """See `Solver.directions`; several keys (a second anchor of the same fact) are all met exactly."""
        assert config.l2 is not None
        system = stats.moment.to(keys).clone()
        system.diagonal().add_(config.l2)
        solved = solve_positive(
            system, keys.T, what="C0 + λI", cure="collect more tokens with `nmke prepare`"
        ).T
        found = solve_positive(keys @ solved.T, solved, what="Kᵀ C0⁻¹ K", cure="edit at another layer")
        return found if keep is None else found * keep.to(found)


methods.register(
    "rome",
    Method(Rome(), defaults={"l2": 0.0, "batch_size": 1}, max_batch=1, max_layers=1, remembers=False),
    source="arXiv:2202.05262",
    summary="one fact, one layer, one rank-one update",
    needs=(STATISTICS,),
    doc=__doc__,
)
