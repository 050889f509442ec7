"""How far two rankings of neurons agree: pure, no model."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def ranks(values: Float[Tensor, "rows neurons"]) -> Float[Tensor, "rows neurons"]:
    """Ranks from 0 within each row, equal values sharing their mean rank; float64."""
    below = torch.searchsorted(values.sort(dim=1).values, values.contiguous(), right=False)
    upto = torch.searchsorted(values.sort(dim=1).values, values.contiguous(), right=True)
    return (below + upto - 1).double() / 2


def spearman(
    first: Float[Tensor, "rows neurons"], second: Float[Tensor, "rows neurons"]
) -> Float[Tensor, " rows"]:
    """Spearman's rank correlation of each pair of rows; 0 where a row is constant."""
    a, b = ranks(first.double()), ranks(second.double())
    a, b = a - a.mean(dim=1, keepdim=True), b - b.mean(dim=1, keepdim=True)
    scale = (a.square().sum(dim=1) * b.square().sum(dim=1)).sqrt()
    return torch.where(scale > 0, (a * b).sum(dim=1) / scale.clamp(min=1e-30), torch.zeros_like(scale))


def top_recall(
    guess: Float[Tensor, "rows neurons"], truth: Float[Tensor, "rows neurons"], share: float
) -> Float[Tensor, " rows"]:
    """Share of each row's true top neurons that are among the guess's top, as many; chance is `share`."""
    count = max(1, round(share * truth.shape[1]))
    wanted = torch.zeros_like(truth, dtype=torch.bool).scatter_(1, truth.topk(count, dim=1).indices, True)
    found = torch.zeros_like(wanted).scatter_(1, guess.topk(count, dim=1).indices, True)
    return (wanted & found).sum(dim=1).double() / count
