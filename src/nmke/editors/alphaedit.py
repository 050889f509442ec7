"""AlphaEdit: write only into the null space of ordinary keys.

Source: Fang et al. 2024, arXiv:2410.02355, eq. 14: ΔWᵀ = (P(K Kᵀ + Cp) + λI)⁻¹ P K Rᵀ.
Differs: solved in the equal dual form P K_all (λI + K_allᵀ P K_all)⁻¹ E, a symmetric system of as many
rows as there are keys, or in the symmetric reduced form once there are more keys than neurons; the
non-symmetric system of the paper is never built.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nmke.config import EditConfig
from nmke.editors.memory import KeyMemory
from nmke.editors.method import STATISTICS, Directions, Method, methods
from nmke.editors.solve import solve_positive
from nmke.stats.covariance import LayerStats, NullSpaceProjector
from nmke.types import Keys, Mask

CURE = "raise `l2` or choose another null space"


@dataclass(frozen=True)
class AlphaEdit:
    """Null-space constrained least squares."""

    def directions(
        self, keys: Keys, stats: LayerStats, memory: KeyMemory, keep: Mask | None, config: EditConfig
    ) -> Directions:
        """See `Solver.directions`; a mask is applied after the solve, as NMKE publishes it."""
        assert config.l2 is not None
        if memory.gram is None:
            found = _dual(keys, memory.rows.double(), stats.projector, config.l2)
        else:
            found = _reduced(keys, memory.moment(), stats.projector, config.l2)
        return found if keep is None else found * keep.to(found)


def _dual(keys: Tensor, past: Tensor, projector: NullSpaceProjector, l2: float) -> Tensor:
    everything = torch.cat([past, keys])
    projected = projector.project(everything)
    system = everything @ projected.T
    system = (system + system.T) / 2
    system.diagonal().add_(l2)
    chosen = torch.zeros(len(everything), len(keys), dtype=keys.dtype, device=keys.device)
    chosen[len(past) :] = torch.eye(len(keys), dtype=keys.dtype, device=keys.device)
    weights = solve_positive(system, chosen, what="λI + Kᵀ P K", cure=CURE)
    return weights.T @ projected


def _reduced(keys: Tensor, moment: Tensor, projector: NullSpaceProjector, l2: float) -> Tensor:
    basis = null_basis(projector)
    inside = basis.T @ keys.T
    system = basis.T @ moment @ basis + inside @ inside.T
    system.diagonal().add_(l2)
    return (basis @ solve_positive(system, inside, what="Uᵀ(K Kᵀ + Cp)U + λI", cure=CURE)).T


def null_basis(projector: NullSpaceProjector) -> Tensor:
    """Orthonormal columns that span the null space, [d_mlp, kept], float64."""
    basis = projector.basis.double()
    if not projector.complement:
        return basis
    size, rank = basis.shape
    full, _ = torch.linalg.qr(basis, mode="complete")
    return full[:, rank:size]


methods.register(
    "alphaedit",
    Method(AlphaEdit(), defaults={"l2": 10.0}),
    source="arXiv:2410.02355",
    summary="least squares inside the null space of ordinary keys, with a memory of earlier edits",
    needs=(STATISTICS,),
    doc=__doc__,
)
