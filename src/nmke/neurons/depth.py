"""Where in the model the neurons of a kind sit: sets drawn over all layers at once, with intervals over facts.

A set drawn layer by layer holds a like share of every layer by construction, so it cannot show where neurons
concentrate. Here one ranking runs over the neurons of every layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    scores: Mapping[int, Scores], sizes: Sequence[int], *, resamples: int = RESAMPLES, seed: int = 0
) -> list[dict[str, DepthProfile]]:
    """Depth of the top general and specific neurons, for each size of the sets.

    Args:
        scores: Per layer, one row per fact: rows are what is resampled.
        sizes: How many neurons of all layers either set holds.
        resamples: Bootstrap samples of the facts.
        seed: Of the resampling.
    """
    table = _joined(scores).double()
    owner = torch.cat([torch.full((found.shape[1],), i) for i, found in enumerate(scores.values())])
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randint(len(table), (resamples, len(table)), generator=generator)
    rows = torch.cat([torch.arange(len(table))[None], draws])  # the facts themselves, then the samples
    weights = torch.zeros(len(rows), len(table), dtype=torch.float64)
    weights.scatter_add_(1, rows, torch.ones_like(rows, dtype=torch.float64))
    rankings = {
        "general": _with_ties(weights @ (table > 0).double(), weights @ table / len(table)),
        "specific": torch.stack([table[row].amax(dim=0) for row in rows]),
    }
    layers = tuple(scores)
    return [
        {kind: _profile(layers, _counts(found, size, owner, len(layers))) for kind, found in rankings.items()}
        for size in sizes
    ]


def _with_ties(
    counts: Float[Tensor, "draws neurons"], means: Float[Tensor, "draws neurons"]
) -> Float[Tensor, "draws neurons"]:
    """Counts of prompts, the mean score deciding among equals."""
    return counts + 0.5 * means / means.abs().amax(dim=1, keepdim=True).clamp(min=1e-30)


def _joined(scores: Mapping[int, Scores]) -> Table:
    return torch.cat([found.cpu() for found in scores.values()], dim=1)


def _top(ranking: Tensor, count: int, ties: Tensor | None = None) -> Mask:
    return keep_top(ranking, count / len(ranking), ties)


def _per_layer(keep: Mask, scores: Mapping[int, Scores]) -> dict[int, Mask]:
    return dict(zip(scores, keep.split([found.shape[1] for found in scores.values()]), strict=True))


def _counts(
    rankings: Float[Tensor, "draws neurons"], size: int, owner: Int[Tensor, " neurons"], layers: int
) -> Float[Tensor, "draws layers"]:
    """Neurons per layer among each ranking's best."""
    best = rankings.topk(min(size, rankings.shape[1]), dim=1).indices
    return torch.stack([torch.bincount(owner[row], minlength=layers) for row in best]).double()


def _profile(layers: tuple[int, ...], counts: Float[Tensor, "draws layers"]) -> DepthProfile:
    """Shares and summaries of a set; the first row holds its own counts, the others the resampled ones."""
    point, sampled = counts[0], counts[1:]
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
