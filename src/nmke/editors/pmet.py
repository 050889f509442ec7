"""PMET: MEMIT's solve with the residual spread by a square root.

Source: Li et al. 2023, arXiv:2308.08742: at the i-th of the layers left, Rᵢ = (Z − current)/√(number left), then
MEMIT's ΔWᵀ = (w0·C0 + K Kᵀ)⁻¹ K Rᵀ.
Differs: the paper optimises a delta of the attention's output beside that of the MLP's and throws the first away;
here the target values are those of every method. w0 = 15000 as MEMIT's.
"""

from __future__ import annotations

from nmke.editors.memit import PUBLISHED, CovarianceSolver
from nmke.editors.method import STATISTICS, Method, methods

methods.register(
    "pmet",
    Method(
        CovarianceSolver(remember=False),
        defaults=PUBLISHED,
        remembers=False,
        share="root",
    ),
    source="arXiv:2308.08742",
    summary="MEMIT with residuals spread by a square root",
    needs=(STATISTICS,),
    doc=__doc__,
)
