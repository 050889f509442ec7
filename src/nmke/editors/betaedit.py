"""BetaEdit: AlphaEdit whose system also weighs what ordinary keys leak into its null space.

Source: Liu et al. 2026, arXiv:2605.09285: with P = U Uᵀ, (Uᵀ(K Kᵀ + Cp + λ₁·C0)U + λI) X' = UᵀK Rᵀ, ΔWᵀ = U X'.
Differs: P is not computed anew every 1000 edits. λ₁ is the setting `covariance_weight`; its default 100 could not be
confirmed.
"""

from __future__ import annotations

from dataclasses import dataclass

from nmke.config import EditConfig
from nmke.editors.alphaedit import CURE, null_basis
from nmke.editors.memory import KeyMemory
from nmke.editors.method import STATISTICS, Directions, Method, methods
from nmke.editors.solve import solve_positive
from nmke.stats.covariance import LayerStats
from nmke.types import Keys, Mask


@dataclass(frozen=True)
class BetaEdit:
    """Null-space constrained least squares, weighed against ordinary keys."""

    def directions(
        self, keys: Keys, stats: LayerStats, memory: KeyMemory, keep: Mask | None, config: EditConfig
    ) -> Directions:
        """See `Solver.directions`; a mask is applied after the solve."""
        assert config.l2 is not None and config.covariance_weight is not None
        basis = null_basis(stats.projector)
        inside = basis.T @ keys.T
        ordinary = memory.moment() + config.covariance_weight * stats.moment.to(keys)
        system = basis.T @ ordinary @ basis + inside @ inside.T
        system = (system + system.T) / 2
        system.diagonal().add_(config.l2)
        found = (basis @ solve_positive(system, inside, what="Uᵀ(K Kᵀ + Cp + λ₁C0)U + λI", cure=CURE)).T
        return found if keep is None else found * keep.to(found)


methods.register(
    "betaedit",
    Method(BetaEdit(), defaults={"l2": 10.0, "covariance_weight": 100.0}),
    source="arXiv:2605.09285",
    summary="AlphaEdit, weighed against ordinary keys inside its null space as well",
    needs=(STATISTICS,),
    doc=__doc__,
)
