"""A mask for every edit: the neurons through which its own key is written, as many as their entropy decides.

Source: ours, after NMKE (arXiv:2510.22139), whose mask is one per batch, and MEMOIR (arXiv:2506.07899), whose
masks depend on the sample. Scores are read where the key is written, the subject's last token:

- `write`: |B|, the edit's direction in an unmasked least-squares solve, which knows ordinary and earlier keys;
- `energy`: k² over the neuron's mean square on ordinary text: fires here and nowhere else;
- `mpc`: |k|, the coefficient alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from nmke.config import EditConfig
from nmke.errors import ConfigError
from nmke.masking.entropy import RatioRange
from nmke.registry import Registry
from nmke.types import Keys

EDIT_RATIO = RatioRange(0.03, 0.05, 1.0)  # the entropy is near .9 for most facts, so 7 to 8 %
MASKS = ("entropy", "fixed", "random", "none")

KeyScores = Float[Tensor, "edits d_mlp"]
MeanSquares = Float[Tensor, " d_mlp"]


class KeyScore(Protocol):
    """How much each neuron matters for writing each edit."""

    def __call__(self, keys: Keys, directions: KeyScores, mean_squares: MeanSquares) -> KeyScores:
        """Scores of at least 0 from keys, unmasked write directions and the mean squares of ordinary keys."""
        ...


key_scores: Registry[KeyScore] = Registry("key score")


def _write(keys: Keys, directions: KeyScores, mean_squares: MeanSquares) -> KeyScores:
    return directions.abs()


def _energy(keys: Keys, directions: KeyScores, mean_squares: MeanSquares) -> KeyScores:
    return keys.square() / mean_squares.to(keys).clamp(min=1e-30)


def _coefficient(keys: Keys, directions: KeyScores, mean_squares: MeanSquares) -> KeyScores:
    return keys.abs()


key_scores.register(
    "write",
    _write,
    source="arXiv:2210.07229, eq. 14",
    summary="absolute entries of the unmasked write direction",
)
key_scores.register(
    "energy",
    _energy,
    source="arXiv:2202.05262, eq. 2, with the diagonal of C0 alone",
    summary="squared key over the neuron's mean square on ordinary text",
)
key_scores.register(
    "mpc", _coefficient, source="arXiv:2510.22139", summary="absolute coefficient at the subject's last token"
)


@dataclass(frozen=True)
class EditMasks:
    """The neurons that each edit may write into.

    Args:
        keep: True where an edit may write, [edits, d_mlp].
        detail: Mean entropy and counts, for the record.
    """

    keep: Bool[Tensor, "edits d_mlp"]
    detail: dict[str, float]


def select_per_edit(scores: KeyScores, config: EditConfig, seed: int = 0) -> EditMasks:
    """Each edit's own neurons.

    Args:
        scores: At least 0, per edit and neuron.
        config: `mask` ("entropy", "fixed", "random" or "none") and `ratio` decide how many.
        seed: Seed of the random masks, which are as large as those that entropy would choose.

    Raises:
        ConfigError: If `mask` is a kind that only a batch has.
    """
    check_mask(config)
    d_mlp = scores.shape[1]
    entropy = [_entropy(row) for row in scores]
    if config.mask == "none":
        counts = [d_mlp] * len(scores)
    elif config.ratio is not None:
        counts = [max(1, round(config.ratio * d_mlp))] * len(scores)
    else:
        counts = [max(1, round(EDIT_RATIO.ratio(h) * d_mlp)) for h in entropy]
    ranking = scores
    if config.mask == "random":
        ranking = torch.rand(scores.shape, generator=torch.Generator().manual_seed(seed)).to(scores)
    keep = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    for row, count in enumerate(counts):
        keep[row, torch.argsort(ranking[row], descending=True, stable=True)[:count]] = True
    return EditMasks(
        keep,
        {
            "edit_entropy": sum(entropy) / len(entropy),
            "kept_per_edit": sum(counts) / len(counts),
            "kept": float(keep.any(dim=0).sum()),
            "d_mlp": float(d_mlp),
        },
    )


def suits_edit(config: EditConfig) -> bool:
    """Whether mask, score and placement are such that each edit can have its own mask."""
    sized = config.mask != "fixed" or config.ratio is not None
    inside = config.placement == "in-solve"
    return config.mask in MASKS and sized and inside and config.attribution in key_scores


def check_mask(config: EditConfig) -> None:
    """Raise unless `suits_edit`.

    Raises:
        ConfigError: Naming the setting that only a batch has.
    """
    key_scores.get(config.attribution)
    if not suits_edit(config):
        raise ConfigError(
            f"mask_scope 'edit' asked with mask {config.mask!r}, ratio {config.ratio} and placement "
            f"{config.placement!r}; a mask per edit is in-solve and one of {', '.join(MASKS)}, 'fixed' with a `ratio`"
        )


def _entropy(scores: Float[Tensor, " d_mlp"]) -> float:
    """Entropy of the scores' shares over log d_mlp, in [0, 1]; 0 when none is positive."""
    total = scores.double().sum()
    if float(total) == 0 or len(scores) == 1:
        return 0.0
    share = scores.double() / total
    return min(max(float(-torch.xlogy(share, share).sum()) / math.log(len(scores)), 0.0), 1.0)
