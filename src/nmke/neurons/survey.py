"""Scores of every neuron in every layer by several metrics, for the same prompts."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from nmke.attribution import Readout, neuron_scores
from nmke.config import EditConfig
from nmke.editors.rows import BareRequest, with_second_anchors
from nmke.editors.scored_prompts import ScoredPrompts, scored_prompts
from nmke.models.load import EditableModel
from nmke.progress import Progress, quiet
from nmke.types import EditRequest, Scores

QUICK = ("lps", "mpc", "contribution", "gradient")  # a few forward passes each; the paper's own first
SLOW = ("ablation",)  # one run of the network per prompt and neuron


@dataclass(frozen=True)
class Survey:
    """What several metrics say about every neuron.

    Args:
        prompts: The prompts scored.
        facts: Per prompt, the index of the fact it asks for.
        readout: What one forward pass over them left behind.
        scores: Per metric and layer, float32 [prompts, d_mlp].
        seconds: Per metric, time of all layers.
    """

    prompts: ScoredPrompts
    facts: tuple[int, ...]
    readout: Readout
    scores: dict[str, dict[int, Scores]]
    seconds: dict[str, float]

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that were read."""
        return tuple(self.readout.coefficients)


def fast_metrics() -> tuple[str, ...]:
    """The quick metrics, and the others that are not slow."""
    others = (name for name in neuron_scores.names() if name not in (*QUICK, *SLOW))
    return (*QUICK, *others)


def survey(
    model: EditableModel,
    requests: Sequence[EditRequest],
    contexts: Sequence[str],
    metrics: Sequence[str],
    config: EditConfig,
    layers: Sequence[int] | None = None,
    progress: Progress = quiet,
) -> Survey:
    """Score every neuron of `layers` for the prompts of `requests`; the model is left as it was.

    Args:
        model: The model, edited or not.
        requests: The facts asked for.
        contexts: Prefixes of every prompt, the first one empty; ("",) for the bare prompts alone.
        metrics: Names out of `neuron_scores`.
        config: `attribution_token`, `attribution_target` and `amplification` are used.
        layers: Layers to read; None for all.
        progress: Told about each layer.

    Raises:
        ConfigError: If a metric is unknown.
        RequestError: If a prompt does not fit the model.
    """
    scorers = {name: neuron_scores.get(name) for name in metrics}
    chosen = tuple(range(model.layout.n_layers)) if layers is None else tuple(layers)
    used, owners = _anchored(model, requests, contexts)
    prompts = scored_prompts(model, used, contexts, config.attribution_token, config.attribution_target)
    readout = prompts.read(model, chosen)
    scores: dict[str, dict[int, Scores]] = {name: {} for name in scorers}
    seconds: dict[str, float] = {}
    with progress.task("scoring neurons", total=len(scorers) * len(chosen)) as task:
        for name, score in scorers.items():
            start = time.perf_counter()
            for layer in chosen:
                scores[name][layer] = score(readout, layer, config.amplification).float()
                task.advance(note=f"{name}, layer {layer}")
            seconds[name] = time.perf_counter() - start
    return Survey(prompts, tuple(owners[row] for row in prompts.owners), readout, scores, seconds)


def _anchored(
    model: EditableModel, requests: Sequence[EditRequest], contexts: Sequence[str]
) -> tuple[list[EditRequest], list[int]]:
    """The requests as an edit would read them; a subject at position 0 is asked for by its longer form."""
    every, owners = with_second_anchors(model, requests)
    longer = {owner for request, owner in zip(every, owners, strict=True) if isinstance(request, BareRequest)}
    kept = [
        (request, owner)
        for request, owner in zip(every, owners, strict=True)
        if len(contexts) > 1 or isinstance(request, BareRequest) or owner not in longer
    ]
    return [request for request, _ in kept], [owner for _, owner in kept]


def by_fact(scores: Mapping[int, Scores], facts: Sequence[int]) -> dict[int, Scores]:
    """Scores averaged over the prompts of each fact, [facts, d_mlp] per layer."""
    index = torch.tensor(list(facts))
    names = sorted(set(facts))
    return {
        layer: torch.stack([found[index.to(found.device) == name].mean(dim=0) for name in names])
        for layer, found in scores.items()
    }
