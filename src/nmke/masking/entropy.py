"""From scores to the share of neurons worth keeping.

Source: NMKE, arXiv:2510.22139, sec. 3.3. General: H = mean entropy of softmax(τ·S) over neurons, ratio
0.3 + 0.1·H. Specific: H' = entropy of max(0, max over prompts of S), normalised to sum 1, ratio 0.2 + 0.1·H'.
The released code uses 0.3 + 0.1·H³ and 0.3 + 0.1·H'². Entropies are divided by log d_mlp.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from nmke.errors import NumericsError
from nmke.types import Scores

Variant = Literal["paper", "released"]


@dataclass(frozen=True)
class RatioRange:
    """ratio = low + span * entropy ** power, with entropy in [0, 1]."""

    low: float
    span: float
    power: float

    def ratio(self, entropy: float) -> float:
        """Share of neurons to keep, in [low, low + span]."""
        return self.low + self.span * entropy**self.power


GENERAL: dict[Variant, RatioRange] = {
    "paper": RatioRange(0.3, 0.1, 1.0),
    "released": RatioRange(0.3, 0.1, 3.0),
}
SPECIFIC: dict[Variant, RatioRange] = {
    "paper": RatioRange(0.2, 0.1, 1.0),
    "released": RatioRange(0.3, 0.1, 2.0),
}


def general_entropy(scores: Scores, temperature: float = 30.0) -> float:
    """How evenly importance is spread over neurons, averaged over prompts.

    Args:
        scores: Attribution per prompt and neuron, nats.
        temperature: τ, multiplies the scores before the softmax.

    Returns:
        Mean entropy over log d_mlp, in [0, 1].

    Raises:
        NumericsError: If `scores` holds NaN or infinity.
    """
    _check(scores)
    log_p = torch.log_softmax(temperature * scores.double(), dim=1)
    return _unit(-(log_p.exp() * log_p).sum(dim=1).mean(), scores.shape[1])


def specific_entropy(scores: Scores) -> float:
    """How evenly the best positive score per neuron is spread over neurons.

    Returns:
        Entropy over log d_mlp in [0, 1]; 0 when no score is positive.

    Raises:
        NumericsError: If `scores` holds NaN or infinity.
    """
    _check(scores)
    best = scores.double().max(dim=0).values.clamp(min=0)
    if float(best.sum()) == 0:
        return 0.0
    share = best / best.sum()
    return _unit(-torch.xlogy(share, share).sum(), scores.shape[1])


def _unit(entropy: Tensor, d_mlp: int) -> float:
    return min(max(float(entropy) / math.log(d_mlp), 0.0), 1.0) if d_mlp > 1 else 0.0


def _check(scores: Scores) -> None:
    if not bool(torch.isfinite(scores).all()):
        raise NumericsError(
            f"{int((~torch.isfinite(scores)).sum())} of {scores.numel()} attribution scores are not finite; "
            "load the model in float32 or lower `amplification`"
        )
