"""Where in the model the neurons of a kind sit: sets drawn over all layers at once, with intervals over facts.

A set drawn layer by layer holds a like share of every layer by construction, so it cannot show where neurons
concentrate. Here one ranking runs over the neurons of every layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nmke.masking.select import general_scores, keep_top, specific_scores
from nmke.types import Mask, Scores

RESAMPLES = 200
Table = Float[Tensor, "prompts neurons"]


@dataclass(frozen=True)
class DepthProfile:
    """How one kind of neuron is spread over the layers.

    Args:
        layers: The layers, first to last.
        counts: Neurons of the set per layer.
        shares, low, high: Their share of the set per layer, with a 95 % bootstrap interval over facts.
        centre: Mean relative depth of the set, 0 the first layer and 1 the last, as (mean, low, high);
            0.5 for a set spread evenly over layers of equal width.
        top_third: Share of the set in the last third of the layers, as (mean, low, high).
        evenness: Entropy of `shares` over the log of the number of layers: 1 spread evenly, 0 in one layer.
    """

    layers: tuple[int, ...]
    counts: tuple[int, ...]
    shares: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    centre: tuple[float, float, float]
    top_third: tuple[float, float, float]
    evenness: float


def top_general(scores: Mapping[int, Scores], count: int) -> dict[int, Mask]:
    """The `count` neurons of all layers that count in most prompts; ties are broken by the mean score."""
    table = _joined(scores)
    return _per_layer(_top(general_scores(table), count, table.double().mean(dim=0)), scores)


def top_specific(scores: Mapping[int, Scores], count: int) -> dict[int, Mask]:
    """The `count` neurons of all layers with the highest score in any prompt."""
    return _per_layer(_top(specific_scores(_joined(scores)), count), scores)


def by_layer_counts(first: Mapping[int, Mask], second: Mapping[int, Mask]) -> list[int]:
    """Neurons that are in both sets, per layer."""
    return [int((first[layer] & second[layer]).sum()) for layer in first]


def depth_profiles(
    scores: Mapping[int, Scores], count: int, *, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, DepthProfile]:
    """Depth of the top `count` general and specific neurons.

    Args:
        scores: Per layer, one row per fact: rows are what is resampled.
        count: Size of either set.
        resamples: Bootstrap samples of the facts.
        seed: Of the resampling.
    """
    table = _joined(scores)
    owner = torch.cat([torch.full((found.shape[1],), i) for i, found in enumerate(scores.values())])
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randint(len(table), (resamples, len(table)), generator=generator)
    rankings = {"general": _general_ranking, "specific": specific_scores}
    found = {}
    for kind, ranking in rankings.items():
        point = _counts(ranking(table), count, owner, len(scores))
        sampled = torch.stack([_counts(ranking(table[draw]), count, owner, len(scores)) for draw in draws])
        found[kind] = _profile(tuple(scores), point, sampled)
    return found


def _general_ranking(table: Table) -> Float[Tensor, " neurons"]:
    """Prompts in which a neuron counts, the mean score deciding among equals."""
    mean = table.double().mean(dim=0)
    return general_scores(table) + 0.5 * mean / mean.abs().max().clamp(min=1e-30)


def _joined(scores: Mapping[int, Scores]) -> Table:
    return torch.cat([found.cpu() for found in scores.values()], dim=1)


def _top(ranking: Tensor, count: int, ties: Tensor | None = None) -> Mask:
    return keep_top(ranking, count / len(ranking), ties)


def _per_layer(keep: Mask, scores: Mapping[int, Scores]) -> dict[int, Mask]:
    return dict(zip(scores, keep.split([found.shape[1] for found in scores.values()]), strict=True))


def _counts(
    ranking: Float[Tensor, " neurons"], count: int, owner: Int[Tensor, " neurons"], layers: int
) -> Float[Tensor, " layers"]:
    best = ranking.topk(min(count, len(ranking))).indices
    return torch.bincount(owner[best], minlength=layers).double()


def _profile(
    layers: tuple[int, ...], point: Float[Tensor, " layers"], sampled: Float[Tensor, "draws layers"]
) -> DepthProfile:
    """Shares and summaries of a set, with intervals from its resampled counts."""
    depth = torch.linspace(0, 1, len(layers), dtype=torch.float64)
    top = (torch.arange(len(layers)) >= len(layers) - max(1, round(len(layers) / 3))).double()
    share, shares = point / point.sum(), sampled / sampled.sum(dim=1, keepdim=True)
    edges = torch.tensor([0.025, 0.975], dtype=torch.float64)
    low, high = shares.quantile(edges, dim=0)

    def summary(weights: Tensor) -> tuple[float, float, float]:
        least, most = (shares @ weights).quantile(edges).tolist()
        return float(share @ weights), least, most

    evenness = float(-torch.xlogy(share, share).sum() / torch.tensor(float(max(2, len(layers)))).log())
    return DepthProfile(
        layers,
        tuple(int(n) for n in point),
        tuple(share.tolist()),
        tuple(low.tolist()),
        tuple(high.tolist()),
        summary(depth),
        summary(top),
        evenness,
    )
