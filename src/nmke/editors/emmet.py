"""EMMET: ROME's equality constraint for many facts at once.

Source: Gupta et al. 2024, arXiv:2403.14236: ΔWᵀ = C0⁻¹ K (Kᵀ C0⁻¹ K + αI)⁻¹ Rᵀ; α > 0 keeps the inner system
invertible for large batches.
Differs: residuals are spread over the layers as in MEMIT. α is the setting `l2`; its default 0.1 could not be
confirmed. With a mask the columns of other neurons are zeroed afterwards.
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
class Emmet:
    """Equality-constrained least squares against ordinary keys."""

    def directions(
        self, keys: Keys, stats: LayerStats, memory: KeyMemory, keep: Mask | None, config: EditConfig
    ) -> Directions:
        """See `Solver.directions`."""
        assert config.l2 is not None
        solved = solve_positive(
            stats.moment.to(keys), keys.T, what="C0", cure="collect more tokens with `nmke prepare`"
        ).T
        inner = keys @ solved.T
        inner = (inner + inner.T) / 2
        inner.diagonal().add_(config.l2)
        found = solve_positive(inner, solved, what="Kᵀ C0⁻¹ K + αI", cure="raise `l2`")
        return found if keep is None else found * keep.to(found)


methods.register(
    "emmet",
    Method(Emmet(), defaults={"l2": 0.1}, remembers=False),
    source="arXiv:2403.14236",
    summary="ROME's equality constraint, for batches",
    needs=(STATISTICS,),
    doc=__doc__,
)
