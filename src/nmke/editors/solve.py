"""Linear algebra shared by the solvers: symmetric positive systems in float64, with the checks that name the fault."""

from __future__ import annotations

import torch
from torch import Tensor

from nmke.errors import NumericsError

LARGEST_CONDITION = 1e13  # beyond it, directions that the system does not determine hold rounding noise


def solve_positive(system: Tensor, right: Tensor, *, what: str, cure: str) -> Tensor:
    """Solve `system @ x = right` for a symmetric positive definite system.

    Args:
        system: [n, n], float64.
        right: [n, columns].
        what: Name of the system, for errors.
        cure: What the user can change.

    Raises:
        NumericsError: If the system is not finite, not positive definite, or ill-conditioned: the
            solution does not satisfy it to a relative 1e-4, or its condition number exceeds 1e13.
    """
    if not bool(torch.isfinite(system).all() and torch.isfinite(right).all()):
        raise NumericsError(f"{what} holds NaN or infinity; the keys or residuals are not finite: {cure}")
    factor, info = torch.linalg.cholesky_ex(system)
    if int(info) != 0:
        raise NumericsError(f"{what} is not positive definite (minor {int(info)} of {len(system)}): {cure}")
    solution = torch.cholesky_solve(right.to(system), factor)
    error = (system @ solution - right).norm() / right.norm().clamp(min=1e-300)
    # What elimination takes from a diagonal entry bounds the condition number from below, whatever the scaling.
    pivots = factor.diagonal().square()
    condition = float((system.diagonal() / pivots).max()) if len(pivots) else 1.0
    if not bool(error < 1e-4) or condition > LARGEST_CONDITION:
        raise NumericsError(
            f"{what} has condition number of at least {condition:.0e} (relative error {float(error):.0e}): {cure}"
        )
    return solution
