"""How editing moved one weight matrix: norms, directions, spectrum and a picture of its columns.

Pure: two matrices in, numbers out. A column is what one neuron writes into the residual stream.
Source: the comparison of edited layers in NMKE, Liu et al. 2025, arXiv:2510.22139.
Differs: the paper does not say over what its Wasserstein distance runs; here it is over the columns' norms, so the
    number is not to be compared with the paper's.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nmke.errors import NumericsError

Matrix = Float[Tensor, "d_model d_mlp"]


@dataclass(frozen=True)
class Stability:
    """One edited matrix W' against its base W, [d_model d_mlp].

    Args:
        relative_norm: ‖W' - W‖ / ‖W‖, Frobenius.
        wasserstein: First Wasserstein distance between the columns' norms before and after, in the weights' units.
        mean_column_norm: Mean norm of a column before, to judge `wasserstein` by.
        cosine_mean, cosine_std, cosine_min: Of the cosine between a column before and after, over all columns.
        changed, columns: How many columns differ, and of how many.
        singular_before, singular_after: Singular values, largest first.
    """

    relative_norm: float
    wasserstein: float
    mean_column_norm: float
    cosine_mean: float
    cosine_std: float
    cosine_min: float
    changed: int
    columns: int
    singular_before: tuple[float, ...]
    singular_after: tuple[float, ...]

    @property
    def spectral_growth(self) -> float:
        """Largest singular value after, over that before."""
        return self.singular_after[0] / self.singular_before[0]

    def as_json(self) -> dict[str, Any]:
        """Its fields, and `spectral_growth`."""
        return asdict(self) | {"spectral_growth": self.spectral_growth}


@dataclass(frozen=True)
class Projection:
    """Columns on the first two principal axes of the base's columns.

    Args:
        index: Which columns.
        before, after: Their places, in the weights' units.
        explained: Share of the base columns' variance along each axis.
    """

    index: Int[Tensor, " shown"]
    before: Float[Tensor, "shown 2"]
    after: Float[Tensor, "shown 2"]
    explained: tuple[float, float]


@torch.no_grad()
def compare(before: Matrix, after: Matrix) -> Stability:
    """All measures of one matrix.

    Args:
        before: The base's weights.
        after: The edited ones, of the same shape.

    Raises:
        NumericsError: If the shapes differ, the base is zero, or a weight is not finite.
    """
    old, new = _checked(before, after)
    norms = old.norm(dim=0), new.norm(dim=0)
    cosines = column_cosines(old, new)
    return Stability(
        relative_norm=float((new - old).norm() / old.norm()),
        wasserstein=wasserstein(*norms),
        mean_column_norm=float(norms[0].mean()),
        cosine_mean=float(cosines.mean()),
        cosine_std=float(cosines.std(correction=0)),
        cosine_min=float(cosines.min()),
        changed=int((old != new).any(dim=0).sum()),
        columns=old.shape[1],
        singular_before=tuple(singular_values(old).tolist()),
        singular_after=tuple(singular_values(new).tolist()),
    )


def wasserstein(first: Float[Tensor, " n"], second: Float[Tensor, " n"]) -> float:
    """First Wasserstein distance between two samples of equal size: mean gap between their sorted values."""
    return float((first.double().sort().values - second.double().sort().values).abs().mean())


def column_cosines(before: Matrix, after: Matrix) -> Float[Tensor, " d_mlp"]:
    """Cosine of each column before and after, in [-1, 1]; 1 for a column that did not change, also if it is zero.

    A zero column that became another one, or the other way round, has cosine 0.
    """
    old, new = before.double(), after.double()
    lengths = old.norm(dim=0) * new.norm(dim=0)
    cosines = (old * new).sum(dim=0) / lengths.clamp_min(torch.finfo(torch.float64).tiny)
    return torch.where((old == new).all(dim=0), torch.ones_like(cosines), cosines.clamp(-1.0, 1.0))


def singular_values(matrix: Matrix) -> Float[Tensor, " rank"]:
    """Singular values, largest first, float64.

    From the eigenvalues of the smaller Gram matrix, which is faster than an SVD; values below 1e-8 of the
    largest are rounding.
    """
    work = matrix.double()
    gram = work @ work.T if work.shape[0] <= work.shape[1] else work.T @ work
    return torch.linalg.eigvalsh(gram).clamp_min(0.0).sqrt().flip(0)


@torch.no_grad()
def project_columns(before: Matrix, after: Matrix, shown: int = 240, seed: int = 0) -> Projection:
    """The columns that moved farthest (a quarter of `shown`) and others at random, on the base's principal axes.

    Args:
        before: The base's weights.
        after: The edited ones.
        shown: How many columns.
        seed: Of the random choice.

    Raises:
        NumericsError: As in `compare`.
    """
    old, new = _checked(before, after)
    middle = old.mean(dim=1, keepdim=True)
    values, axes = torch.linalg.eigh((old - middle) @ (old - middle).T)  # ascending
    plane = axes[:, -2:].flip(1)  # [d_model 2]
    plane = plane * plane.gather(0, plane.abs().argmax(dim=0, keepdim=True)).sign()
    index = _spread((new - old).norm(dim=0), min(shown, old.shape[1]), seed)
    explained = (values[-2:].flip(0) / values.sum().clamp_min(torch.finfo(torch.float64).tiny)).tolist()
    return Projection(
        index,
        (old[:, index] - middle).T @ plane,
        (new[:, index] - middle).T @ plane,
        (explained[0], explained[1]),
    )


def _spread(moved: Float[Tensor, " d_mlp"], shown: int, seed: int) -> Int[Tensor, " shown"]:
    order = moved.argsort(descending=True)
    rest = order[shown // 4 :]
    generator = torch.Generator().manual_seed(seed)
    drawn = rest[torch.randperm(len(rest), generator=generator)[: shown - shown // 4].to(rest.device)]
    return torch.cat([order[: shown // 4], drawn]).sort().values


def _checked(before: Matrix, after: Matrix) -> tuple[Matrix, Matrix]:
    """Both in float64."""
    if before.shape != after.shape:
        raise NumericsError(
            f"matrices of shape {tuple(before.shape)} and {tuple(after.shape)} were compared; "
            "give the same layer before and after"
        )
    old, new = before.double(), after.double()
    if not bool(old.isfinite().all() and new.isfinite().all()):
        raise NumericsError("a matrix to compare holds NaN or infinity; restore the run with `nmke undo`")
    if not bool((old != 0).any()):
        raise NumericsError(
            "the base matrix is zero, so nothing can be measured against it; give its weights"
        )
    return old, new
