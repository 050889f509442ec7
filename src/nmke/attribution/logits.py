"""From hidden states to raw logits and log-probabilities, in the precision that scores are computed in."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nmke.models.layout import ModelLayout
from nmke.models.weights import written_matrix


def wide(tensor: Tensor) -> Tensor:
    """The tensor in float32, or as it is when it is float64."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def raw_logits(layout: ModelLayout, normed: Float[Tensor, "rows d_model"]) -> Float[Tensor, "rows d_vocab"]:
    """Unembedding of normed hidden states, float32, before the model's own logit map."""
    weight = written_matrix(layout.unembedding)
    bias = getattr(layout.unembedding, "bias", None)
    logits = normed.to(weight.dtype) @ weight.T
    return wide(logits if bias is None else logits + bias)


def log_probs_of(
    layout: ModelLayout, hidden: Float[Tensor, "rows d_model"], tokens: Int[Tensor, " rows"]
) -> Float[Tensor, " rows"]:
    """Log-probability of one token per row, from hidden states before the final norm; nats."""
    logits = layout.logit_map.apply(raw_logits(layout, layout.final_norm(hidden)))
    return torch.log_softmax(logits, dim=1).gather(1, tokens[:, None])[:, 0]
