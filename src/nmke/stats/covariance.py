"""Key statistics of one layer: the streamed second moment E[k kᵀ] and its null-space projector.

`key covariance` is the field's word; it is *not* centred: no mean is subtracted. Pure tensor code.
Source: ROME (arXiv:2202.05262, eq. 2) for the moment, AlphaEdit (arXiv:2410.02355, sec. 3.2) for the projector.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from nmke.errors import ConfigError, NumericsError, StatsError
from nmke.types import Gram

LARGEST_EXACT = 8192  # neurons of a layer up to which sums, bases and factors are float64 and held in memory

NullSpaceRule = Literal["threshold", "share", "energy"]


@dataclass
class KeyCovariance:
    """Running second moment of a layer's keys.

    Args:
        total: Sum of k kᵀ over all keys seen, [d_mlp, d_mlp], float64 (float32 above `LARGEST_EXACT`).
        count: How many keys were seen.
    """

    total: Gram
    count: int = 0

    @classmethod
    def empty(cls, d_mlp: int, device: torch.device | str = "cpu") -> KeyCovariance:
        """Statistics that have seen nothing."""
        dtype = torch.float64 if d_mlp <= LARGEST_EXACT else torch.float32
        return cls(torch.zeros(d_mlp, d_mlp, dtype=dtype, device=device))

    def add(self, keys: Float[Tensor, "batch d_mlp"]) -> None:
        """Add keys; products are taken in float32, sums in the accumulator's type."""
        keys = keys.detach().float()
        self.total += (keys.T @ keys).to(self.total)
        self.count += len(keys)

    def merge(self, other: KeyCovariance) -> KeyCovariance:
        """Statistics of both samples together.

        Raises:
            StatsError: If the sizes differ.
        """
        if self.total.shape != other.total.shape:
            raise StatsError(
                f"cannot merge key statistics of {len(self.total)} and {len(other.total)} neurons; "
                "both must come from the same layer"
            )
        return KeyCovariance(self.total + other.total.to(self.total), self.count + other.count)

    @property
    def moment(self) -> Gram:
        """E[k kᵀ], [d_mlp, d_mlp], in the accumulator's type.

        Raises:
            StatsError: If no key was seen.
            NumericsError: If the sum is not finite.
        """
        if self.count == 0:
            raise StatsError("key statistics hold no samples; run `nmke prepare` for this model")
        if not bool(torch.isfinite(self.total).all()):
            raise NumericsError(
                "key statistics are not finite; the model's activations overflow: use float32"
            )
        return self.total / self.count


@dataclass(frozen=True)
class OrdinaryInputs:
    """What one layer's MLP is given ordinarily: E[x₁ x₁ᵀ] of its inputs x with a one below each.

    Args:
        text: Over the tokens of ordinary text, [d_model + 1, d_model + 1].
        subjects: Over the tokens of ordinary subjects (`nmke.stats.subjects`), [d_model + 1, d_model + 1].
    """

    text: Gram
    subjects: Gram


@dataclass(frozen=True)
class NullSpaceProjector:
    """P = U Uᵀ onto the directions that keys of ordinary text hardly use.

    Only the smaller of the two bases is kept: `basis` spans the null space when `complement` is False,
    its orthogonal complement otherwise (then P = I - basis basisᵀ).

    Args:
        basis: Orthonormal columns [d_mlp, rank], in the type of the moment they were found in.
        complement: Which of the two spaces `basis` spans.
        kept: Number of directions of the null space.
    """

    basis: Float[Tensor, "d_mlp rank"]
    complement: bool
    kept: int

    def project(self, vectors: Float[Tensor, "edits d_mlp"]) -> Float[Tensor, "edits d_mlp"]:
        """P applied to each row."""
        inside = ((vectors.to(self.basis) @ self.basis) @ self.basis.T).to(vectors)
        return vectors - inside if self.complement else inside

    def dense(self) -> Gram:
        """The full matrix P [d_mlp, d_mlp]; for tests and small layers."""
        return self.project(torch.eye(len(self.basis), dtype=self.basis.dtype, device=self.basis.device))


def null_space(moment: Gram, rule: NullSpaceRule = "threshold", value: float = 2e-2) -> NullSpaceProjector:
    """Projector onto the directions of smallest eigenvalue of the key covariance.

    Args:
        moment: E[k kᵀ], symmetric.
        rule: "threshold" keeps eigenvalues below `value` (AlphaEdit); "share" keeps that fraction of the
            directions; "energy" keeps the largest set whose eigenvalues sum to at most that fraction of the trace.
        value: See `rule`.

    Raises:
        ConfigError: If `value` is out of range for the rule, or the rule leaves no direction.
        NumericsError: If the eigendecomposition fails.
    """
    if value <= 0 or (rule != "threshold" and value >= 1):
        raise ConfigError(
            f"null-space {rule} {value} is out of range; give a share in (0, 1) or a threshold > 0"
        )
    try:
        eigenvalues, vectors = torch.linalg.eigh(moment.double())
    except torch.linalg.LinAlgError as error:
        raise NumericsError(
            f"eigendecomposition of the key covariance failed: {error}; prepare it anew"
        ) from error
    kept = _count_kept(eigenvalues, rule, value)
    if kept == 0:
        raise ConfigError(
            f"null-space {rule} {value} keeps none of {len(moment)} directions (smallest eigenvalue "
            f"{eigenvalues[0]:.2e}, median {eigenvalues.median():.2e}); raise it or choose rule 'share'"
        )
    complement = kept > len(moment) // 2
    basis = vectors[:, kept:] if complement else vectors[:, :kept]
    return NullSpaceProjector(basis.contiguous().to(moment.dtype), complement, kept)


def _count_kept(eigenvalues: Float[Tensor, " d_mlp"], rule: NullSpaceRule, value: float) -> int:
    if rule == "threshold":
        return int((eigenvalues < value).sum())
    if rule == "share":
        return round(value * len(eigenvalues))
    energy = eigenvalues.clamp(min=0).cumsum(0)
    return int((energy <= value * energy[-1]).sum())


@dataclass
class LayerStats:
    """What solvers know about one layer's ordinary keys; the rest is computed when first asked for, and kept.

    Args:
        held: E[k kᵀ] [d_mlp, d_mlp], or, for a layer too large to hold it beside what is made of it, where to
            read it when it is needed.
        rule, value: How the null space is chosen, see `null_space`.
        systems: Factored systems of solvers that go on from batch to batch, by their settings.
    """

    held: Gram | Callable[[], Gram]
    rule: NullSpaceRule = "threshold"
    value: float = 2e-2
    systems: dict[tuple[Any, ...], Any] = field(default_factory=dict, repr=False)
    _projector: NullSpaceProjector | None = field(default=None, repr=False)
    _mean_squares: Float[Tensor, " d_mlp"] | None = field(default=None, repr=False)

    @property
    def moment(self) -> Gram:
        """E[k kᵀ], [d_mlp, d_mlp]."""
        return self.held() if callable(self.held) else self.held

    @property
    def mean_squares(self) -> Float[Tensor, " d_mlp"]:
        """Each neuron's mean square, the diagonal of `moment`."""
        if self._mean_squares is None:
            self._mean_squares = self.moment.diagonal().clone()
        return self._mean_squares

    @cached_property
    def sha256(self) -> str:
        """Hash of the moment's bytes."""
        return hashlib.sha256(self.moment.cpu().contiguous().numpy().data).hexdigest()

    @property
    def projector(self) -> NullSpaceProjector:
        """The null-space projector of this layer."""
        if self._projector is None:
            self._projector = null_space(self.moment, self.rule, self.value)
        return self._projector
