"""A weight change as a product of two thin matrices: how many directions it takes, and which. Pure tensors."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

Energies = Float[Tensor, " d_model"]


def direction_energies(
    update: Float[Tensor, "d_model d_mlp"],
) -> tuple[Energies, Float[Tensor, "d_model d_model"]]:
    """Squared singular values, largest first, with the left singular vectors as columns, in float64.

    From the eigenvectors of update @ update.T: faster than an SVD, and exact enough for energies down to
    1e-13 of the largest.
    """
    exact = update.double()
    values, vectors = torch.linalg.eigh(exact @ exact.T)
    return values.flip(0).clamp(min=0), vectors.flip(1)


def residual_energies(energies: Energies) -> Float[Tensor, " ranks"]:
    """What the best approximation of rank r leaves over, for r from 0 to d_model, as squared Frobenius norm."""
    tails = energies.flip(0).cumsum(0).flip(0)  # sums from the small end: no cancellation
    return torch.cat([tails, tails.new_zeros(1)])


def rounding_energy(weights: Float[Tensor, "d_model touched"]) -> float:
    """Expected squared norm of the error when weights of this size are rounded once to their own type.

    A number between 2^e and 2^(e+1) is rounded to a multiple of eps·2^e, which errs by eps·2^e/√12 on average.
    """
    _, exponent = torch.frexp(weights.float())  # |w| in [2^(exponent - 1), 2^exponent)
    steps = torch.finfo(weights.dtype).eps * torch.exp2(exponent.double() - 1)
    return float(steps.square().where(weights != 0, 0).sum() / 12)


def factors(
    update: Float[Tensor, "d_model d_mlp"], vectors: Float[Tensor, "d_model d_model"], rank: int
) -> tuple[Float[Tensor, "d_model rank"], Float[Tensor, "rank d_mlp"]]:
    """The best approximation left @ right of the given rank, in float32; spare directions are zero."""
    kept = vectors[:, :rank]
    left = update.new_zeros(update.shape[0], rank, dtype=torch.float32)
    left[:, : kept.shape[1]] = kept
    right = update.new_zeros(rank, update.shape[1], dtype=torch.float32)
    right[: kept.shape[1]] = kept.T @ update.double()
    return left, right
