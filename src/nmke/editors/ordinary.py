"""Solve A X = K with A = w0·C0 + λI + P Pᵀ, P being the keys of earlier edits, at a cost that knows no d_mlp³.

w0·C0 + λI is factored once per layer and kept. What earlier keys add to it is small: with Q = (w0·C0 + λI)⁻¹ P and
Y = (w0·C0 + λI)⁻¹ K the matrix inversion lemma gives X = Y - Q (I + Pᵀ Q)⁻¹ Pᵀ Y. Q is kept too and grows with the
run, so that a batch of B edits behind n earlier ones costs O(d_mlp² B + d_mlp n² + n³).
Source: the lemma is Woodbury's; w0·C0 + K Kᵀ is MEMIT's, arXiv:2210.07229, eq. 14.

Memory: the factor is d_mlp² numbers. `covariance_rank` r keeps C0's r leading directions one by one and gives the
others their mean: d_mlp·r numbers in place of d_mlp², exact for r = d_mlp.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from nmke.config import EditConfig
from nmke.editors.solve import solve_positive
from nmke.errors import NumericsError
from nmke.stats.covariance import LayerStats
from nmke.types import Gram, Keys

BLOCK = 16  # earlier keys solved for together; a block's bits do not depend on when it was solved
CURE = "raise `l2` or collect more tokens with `nmke prepare`"
WHAT = "w0·C0 + λI"


class Factor(Protocol):
    """w0·C0 + λI in a form that solves."""

    @property
    def dtype(self) -> torch.dtype:
        """Type that it is kept and solved in."""
        ...

    def solve(self, keys: Keys) -> Keys:
        """(w0·C0 + λI)⁻¹ of each row."""
        ...


@dataclass(frozen=True)
class CholeskyFactor:
    """The whole matrix, factored.

    Args:
        lower: Its Cholesky factor, [d_mlp, d_mlp].
    """

    lower: Gram

    @property
    def dtype(self) -> torch.dtype:
        """See `Factor`."""
        return self.lower.dtype

    @classmethod
    def of(cls, moment: Gram, weight: float, l2: float) -> CholeskyFactor:
        """Factor weight · moment + l2 · I in the moment's own type, at least float32.

        Raises:
            NumericsError: If it is not finite or not positive definite.
        """
        system = moment * weight
        system.diagonal().add_(l2)
        if not bool(torch.isfinite(system).all()):
            raise NumericsError(f"{WHAT} holds NaN or infinity: {CURE}")
        lower, info = torch.linalg.cholesky_ex(system)
        if int(info):
            raise NumericsError(
                f"{WHAT} is not positive definite (minor {int(info)} of {len(system)}): {CURE}"
            )
        return cls(lower)

    def solve(self, keys: Keys) -> Keys:
        """See `Factor`."""
        return torch.cholesky_solve(keys.to(self.lower).T, self.lower).T.to(keys)


@dataclass(frozen=True)
class LeadingFactor:
    """The leading directions one by one, all others with their mean eigenvalue.

    Args:
        basis: Orthonormal columns, [d_mlp, rank].
        inner: What (w0·C0 + λI)⁻¹ has on each of them beyond `rest`, [rank].
        rest: What it has on every other direction.
    """

    basis: Float[Tensor, "d_mlp rank"]
    inner: Float[Tensor, " rank"]
    rest: float

    @property
    def dtype(self) -> torch.dtype:
        """See `Factor`."""
        return self.basis.dtype

    @classmethod
    def of(cls, moment: Gram, weight: float, l2: float, rank: int) -> LeadingFactor:
        """The best such matrix for weight · moment + l2 · I.

        Raises:
            NumericsError: If it is not finite or not positive definite.
        """
        if not bool(torch.isfinite(moment).all()):
            raise NumericsError(f"{WHAT} holds NaN or infinity: {CURE}")
        values, vectors = torch.linalg.eigh(moment)  # float32 for a large layer, whose sums are float32 too
        values = values.double()
        values = weight * values + l2
        tail = values[: len(values) - rank]
        mean = float(tail.mean()) if len(tail) else 1.0
        if float(values[0]) <= 0 and (rank == len(values) or mean <= 0):
            raise NumericsError(
                f"{WHAT} is not positive definite (smallest eigenvalue {values[0]:.1e}): {CURE}"
            )
        keep = slice(len(values) - rank, None)
        inner = 1 / values[keep] - 1 / mean
        return cls(vectors[:, keep].contiguous().to(moment.dtype), inner.to(moment.dtype), 1 / mean)

    def solve(self, keys: Keys) -> Keys:
        """See `Factor`."""
        inside = (keys.to(self.basis) @ self.basis) * self.inner
        return (inside @ self.basis.T).to(keys) + keys * self.rest


def ordinary_system(stats: LayerStats, config: EditConfig) -> OrdinarySystem:
    """The layer's system under these settings, factored at the first call and kept in `stats`.

    Args:
        stats: The layer's ordinary keys.
        config: `covariance_weight`, `l2` and `covariance_rank`.

    Raises:
        NumericsError: If it is not finite or not positive definite.
    """
    weight, l2, rank = config.covariance_weight, config.l2, config.covariance_rank
    assert weight is not None and l2 is not None
    if (weight, l2, rank) not in stats.systems:
        moment = stats.moment
        if rank is None or rank >= len(moment):
            system = OrdinarySystem(CholeskyFactor.of(moment, weight, l2))
        else:
            system = OrdinarySystem(LeadingFactor.of(moment, weight, l2, rank), keeps=False)
        stats.systems[weight, l2, rank] = system
    return stats.systems[weight, l2, rank]


@dataclass
class OrdinarySystem:
    """One layer's w0·C0 + λI, factored, and the earlier keys that were solved for so far.

    Args:
        factor: See `Factor`.
        keeps: Whether what was solved for is kept; where solving is cheap it is not worth its memory.
    """

    factor: Factor
    keeps: bool = True
    _rows: Keys | None = field(default=None, repr=False)
    _solved: Keys | None = field(default=None, repr=False)

    def solve(self, keys: Keys, past: Keys) -> Keys:
        """(w0·C0 + λI + P Pᵀ)⁻¹ k of every key, as rows.

        Args:
            keys: [edits, d_mlp], float64.
            past: P's columns as rows, [past, d_mlp].

        Raises:
            NumericsError: If the inner system is not finite or ill-conditioned.
        """
        found = self.factor.solve(keys)
        if not len(past):
            return found
        solved = self.solved(past).to(keys)
        earlier = past.to(keys)
        inner = earlier @ solved.T
        inner = (inner + inner.T) / 2
        inner.diagonal().add_(1.0)
        weights = solve_positive(inner, earlier @ found.T, what="I + Pᵀ(w0·C0 + λI)⁻¹P", cure=CURE)
        return found - weights.T @ solved

    def solved(self, past: Keys) -> Keys:
        """(w0·C0 + λI)⁻¹ of every earlier key; whole blocks are kept from call to call."""
        kept = self._kept(past)
        blocks = [] if self._solved is None or not kept else [self._solved[:kept]]
        blocks += [self.factor.solve(block.to(self.factor.dtype)) for block in past[kept:].split(BLOCK)]
        found = torch.cat(blocks)
        if self.keeps:
            self._rows, self._solved = past, found
        return found

    def _kept(self, past: Keys) -> int:
        """How many of the rows solved before still stand first, in whole blocks."""
        if self._rows is None:
            return 0
        common = min(len(past), len(self._rows))
        same = (past[:common] == self._rows[:common]).all(dim=1).long()
        return int(same.cumprod(0).sum()) // BLOCK * BLOCK
