"""MEMIT: edit many facts at once, weighed against ordinary keys.

Source: Meng et al. 2022, arXiv:2210.07229, eq. 14: ΔWᵀ = (w0·C0 + K Kᵀ)⁻¹ K Rᵀ.
Differs: solved in float64 by Cholesky; `memit-memory` adds the keys of earlier edits to the system.
With a mask the system is solved on the kept neurons alone (as NMKE's in-solve placement does).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nmke.config import EditConfig
from nmke.editors.memory import KeyMemory
from nmke.editors.method import STATISTICS, Directions, Method, methods
from nmke.editors.solve import solve_positive
from nmke.stats.covariance import LayerStats
from nmke.types import Keys, Mask

PUBLISHED = {"covariance_weight": 15_000.0, "l2": 0.0}  # what methods that change only MEMIT's update keep


@dataclass(frozen=True)
class CovarianceSolver:
    """(w0·C0[S,S] + K_S K_Sᵀ + Cp[S,S] + λI)⁻¹ K_S on the kept neurons S, zero elsewhere.

    Args:
        remember: Whether the keys of earlier edits (Cp) enter the system.
    """

    remember: bool

    def directions(
        self, keys: Keys, stats: LayerStats, memory: KeyMemory, keep: Mask | None, config: EditConfig
    ) -> Directions:
        """See `Solver.directions`; the constrained optimum over updates that touch kept neurons only."""
        assert config.covariance_weight is not None and config.l2 is not None
        everything = torch.ones(keys.shape[1], dtype=torch.bool, device=keys.device)
        index = (everything if keep is None else keep).nonzero().squeeze(1)
        part = keys[:, index]
        system = config.covariance_weight * stats.moment[index][:, index].to(part) + part.T @ part
        if self.remember:
            system = system + memory.submatrix(index).to(system)
        system.diagonal().add_(config.l2)
        cure = "raise `l2` or collect more tokens with `nmke prepare`"
        solved = solve_positive(system, part.T, what="w0·C0 + K Kᵀ + λI", cure=cure)
        found = torch.zeros_like(keys)
        found[:, index] = solved.T
        return found


methods.register(
    "memit",
    Method(CovarianceSolver(remember=False), defaults=PUBLISHED, remembers=False),
    source="arXiv:2210.07229",
    summary="least squares against ordinary keys; earlier edits are not protected",
    needs=(STATISTICS,),
    doc=__doc__,
)
methods.register(
    "memit-memory",
    Method(CovarianceSolver(remember=True), defaults={"covariance_weight": 1_000.0, "l2": 0.0}),
    source="arXiv:2210.07229, with the key memory of arXiv:2410.02355",
    summary="MEMIT whose system also holds the keys of earlier edits",
    needs=(STATISTICS,),
    doc=__doc__,
)
