"""From scores to the neurons that may change.

Source: NMKE, arXiv:2510.22139, sec. 3.3: knowledge-general neurons count in most prompts, knowledge-specific
ones score very high in one; the mask is their union.
Differs: a ratio asked for is the ratio got. The general count is an integer up to the number of prompts, so
a quantile of it keeps far more neurons than asked (0.35-0.71 for 0.30-0.40); ties are broken by the mean
score. `variant="released"` keeps the quantile with its ties, and counts by z-score, as the released code does.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from nmke.config import EditConfig
from nmke.errors import ConfigError
from nmke.masking.entropy import GENERAL, SPECIFIC, Variant, general_entropy, specific_entropy
from nmke.types import Mask, NeuronMask, Scores


def general_scores(scores: Scores, variant: Variant = "paper") -> Float[Tensor, " d_mlp"]:
    """In how many prompts each neuron counts: score > 0 (paper) or z-score over neurons > 0 (released)."""
    if variant == "released":
        deviation = scores.std(dim=1, keepdim=True).clamp(min=1e-12)
        scores = (scores - scores.mean(dim=1, keepdim=True)) / deviation
    return (scores > 0).sum(dim=0).double()


def specific_scores(scores: Scores) -> Float[Tensor, " d_mlp"]:
    """Each neuron's best score over prompts."""
    return scores.max(dim=0).values.double()


def keep_top(
    ranking: Float[Tensor, " d_mlp"], ratio: float, ties: Float[Tensor, " d_mlp"] | None = None
) -> Mask:
    """Exactly round(ratio · d_mlp) neurons with the highest ranking, at least one.

    Args:
        ranking: What to rank by.
        ratio: Share to keep, in (0, 1].
        ties: What decides among equals; the lower index wins what is still tied.
    """
    count = max(1, round(ratio * len(ranking)))
    order = torch.arange(len(ranking), device=ranking.device)
    for values in (ties, ranking):
        if values is not None:
            order = order[torch.argsort(values[order], descending=True, stable=True)]
    keep = torch.zeros(len(ranking), dtype=torch.bool, device=ranking.device)
    keep[order[:count]] = True
    return keep


def keep_quantile(ranking: Float[Tensor, " d_mlp"], ratio: float) -> Mask:
    """Neurons at or above the (1 - ratio)-quantile, ties included, as the released code selects."""
    return ranking >= torch.quantile(ranking.double(), 1 - ratio)


def random_mask(d_mlp: int, count: int, seed: int) -> Mask:
    """`count` neurons at random: the control of equal size."""
    generator = torch.Generator().manual_seed(seed)
    keep = torch.zeros(d_mlp, dtype=torch.bool)
    keep[torch.randperm(d_mlp, generator=generator)[:count]] = True
    return keep


def select_neurons(scores: Scores, config: EditConfig, seed: int = 0) -> NeuronMask:
    """The neurons of one layer that a batch may write into.

    Args:
        scores: Attribution per prompt and neuron, nats.
        config: `mask`, `variant`, `ratio` and `temperature` decide.
        seed: Seed of the random mask.

    Raises:
        ConfigError: If `mask` is "fixed" with a `ratio`, or "none".
        NumericsError: If a score is not finite.
    """
    if config.mask == "none":
        raise ConfigError("mask 'none' selects nothing; leave the mask out instead")
    sets = split_neurons(scores, config)
    keep = _combine(sets.general, sets.specific, config, seed)
    return NeuronMask(keep, {**sets.detail, "kept": float(keep.sum())})


@dataclass(frozen=True)
class NeuronSets:
    """The two kinds of neurons of one layer.

    Args:
        general: Knowledge-general neurons, [d_mlp].
        specific: Knowledge-specific neurons, [d_mlp].
        detail: Entropies, ratios asked for, and how many neurons each set holds.
    """

    general: Mask
    specific: Mask
    detail: dict[str, float]


def split_neurons(scores: Scores, config: EditConfig) -> NeuronSets:
    """Knowledge-general and knowledge-specific neurons of one layer, as many as entropy decides.

    Args:
        scores: Attribution per prompt and neuron, nats.
        config: `variant` and `temperature` decide; `mask` "fixed" takes the fixed ratios.

    Raises:
        NumericsError: If a score is not finite.
    """
    entropies = {
        "general_entropy": general_entropy(scores, config.temperature),
        "specific_entropy": specific_entropy(scores),
    }
    variant: Variant = config.variant
    general_ratio = GENERAL[variant].ratio(entropies["general_entropy"])
    specific_ratio = SPECIFIC[variant].ratio(entropies["specific_entropy"])
    if config.mask == "fixed":
        general_ratio, specific_ratio = 0.35, 0.25  # the paper's fixed-ratio ablation
    general = _general(scores, general_ratio, variant)
    specific = _specific(scores, specific_ratio, variant)
    detail = {
        **entropies,
        "general_ratio": general_ratio,
        "specific_ratio": specific_ratio,
        "general": float(general.sum()),
        "specific": float(specific.sum()),
        "overlap": float((general & specific).sum()),
        "d_mlp": float(len(general)),
    }
    return NeuronSets(general, specific, detail)


def _general(scores: Scores, ratio: float, variant: Variant) -> Mask:
    counts = general_scores(scores, variant)
    if variant == "released":
        return keep_quantile(counts, ratio)
    return keep_top(counts, ratio, ties=scores.double().mean(dim=0))


def _specific(scores: Scores, ratio: float, variant: Variant) -> Mask:
    best = specific_scores(scores)
    return keep_quantile(best, ratio) if variant == "released" else keep_top(best, ratio)


def _combine(general: Mask, specific: Mask, config: EditConfig, seed: int) -> Mask:
    union = general | specific
    if config.mask == "fixed" and config.ratio is not None:
        raise ConfigError(
            "mask 'fixed' is the paper's 0.35/0.25 ablation and takes no `ratio`; drop one of them"
        )
    if config.mask == "random":
        count = int(union.sum()) if config.ratio is None else max(1, round(config.ratio * len(union)))
        return random_mask(len(union), count, seed).to(union.device)
    chosen = {
        "general": general,
        "specific": specific,
        "overlap": general & specific,
        "non-overlap": general ^ specific,
    }
    return chosen.get(config.mask, union)
