"""A survey as one JSON object, `nmke.neurons/1`; the report and the charts read it, none recomputes.

The fields are described in docs/neurons.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from nmke.attribution import neuron_scores
from nmke.batches import versions
from nmke.config import EditConfig
from nmke.masking.select import split_neurons
from nmke.models.load import EditableModel
from nmke.neurons.depth import by_layer_counts, depth_profiles, top_general, top_specific
from nmke.neurons.survey import Survey, by_fact
from nmke.neurons.words import Neuron, exciting_prompts, neuron_values, promoted_tokens
from nmke.types import EditRequest, Scores

SCHEMA = "nmke.neurons/1"
UNITS = {
    "lps": "nats",
    "psa": "probability",
    "mpc": "coefficient",
    "contribution": "logits",
    "gradient": "nats",
    "integrated": "nats",
    "ablation": "nats",
}
COUNTS = ("general", "specific", "overlap", "d_mlp")
LISTED = 5  # neurons named per layer and kind


def survey_record(
    model: EditableModel,
    found: Survey,
    requests: Sequence[EditRequest],
    config: EditConfig,
    edited_layers: Sequence[int],
    *,
    share: float,
    shown: int,
    texts: Sequence[str],
) -> dict[str, Any]:
    """The record of a survey.

    Args:
        model: The model that was surveyed.
        found: The survey.
        requests: The facts it asked for.
        config: The settings it was made with.
        edited_layers: The layers that an edit with these settings would write to.
        share: Size of the sets that are drawn over all layers at once, as a share of all neurons.
        shown: Neurons of either kind that are described by words.
        texts: Texts among which the exciting ones are looked for, beside the prompts.
    """
    metrics = {name: _metric(name, found, config, share) for name in found.scores}
    first = next(iter(found.scores))
    named = _named(found.scores[first], shown)
    content = {
        "schema": SCHEMA,
        "model": _about(model, edited_layers),
        "versions": versions(),
        "settings": {
            "token": config.attribution_token,
            "target": config.attribution_target,
            "amplification": config.amplification,
            "temperature": config.temperature,
            "variant": config.variant,
            "share": share,
        },
        "facts": [{"id": r.id, "prompt": r.text, "subject": r.subject} for r in requests],
        "prompts": _prompts(model, found, requests),
        "metrics": metrics,
        "neurons": _described(model, named, found, texts),
    }
    return dict(_rounded(content))


def _about(model: EditableModel, edited_layers: Sequence[int]) -> dict[str, Any]:
    return {
        "name": model.name,
        "source": model.source,
        "n_layers": model.layout.n_layers,
        "d_model": model.layout.d_model,
        "d_mlp": list(model.layout.d_mlp),
        "edited_layers": list(edited_layers),
    }


def _rounded(value: Any) -> Any:
    """The same with six digits of every number, which is what float32 scores hold."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {name: _rounded(one) for name, one in value.items()}
    return [_rounded(one) for one in value] if isinstance(value, list | tuple) else value


def _prompts(model: EditableModel, found: Survey, requests: Sequence[EditRequest]) -> list[dict[str, Any]]:
    rows, rerun = found.prompts.rows, found.readout.rerun
    decode = model.tokenizer.decode
    return [
        {
            "fact": requests[fact].id,
            "text": decode(list(row.ids), skip_special_tokens=True),
            "bare": row.bare,
            "token": decode([row.ids[at]]),
            "target": decode([target]),
        }
        for row, fact, at, target in zip(
            rows, found.facts, rerun.rows.anchors, found.readout.targets.tolist(), strict=True
        )
    ]


def _metric(name: str, found: Survey, config: EditConfig, share: float) -> dict[str, Any]:
    """One metric: a row per layer, and its depth profiles where all layers were read."""
    scores = found.scores[name]
    facts = by_fact(scores, found.facts)
    count = max(1, round(share * sum(layer.shape[1] for layer in scores.values())))
    (profiles,) = depth_profiles(facts, [count])
    overlap = by_layer_counts(top_general(facts, count), top_specific(facts, count))
    return {
        "unit": UNITS.get(name, ""),
        "summary": neuron_scores.entry(name).summary,
        "source": neuron_scores.entry(name).source,
        "seconds": found.seconds[name],
        "layers": [_layer(layer, one, config) for layer, one in scores.items()],
        "over_all_layers": {
            "neurons": count,
            "overlap": overlap,
            **{kind: asdict(profile) for kind, profile in profiles.items()},
        },
    }


def _layer(layer: int, scores: Scores, config: EditConfig) -> dict[str, Any]:
    """One layer's sets, as an edit of these facts would draw them, and its scores in short."""
    sets = split_neurons(scores, config)
    mean, best = scores.double().mean(dim=0), scores.double().max(dim=0).values
    counts = {name: int(value) for name, value in sets.detail.items() if name in COUNTS}
    ratios = {name: value for name, value in sets.detail.items() if name not in COUNTS}
    return {
        "layer": layer,
        **counts,
        "kept": int((sets.general | sets.specific).sum()),
        **ratios,
        "mean": float(scores.mean()),
        "mean_abs": float(scores.abs().mean()),
        "std": float(scores.std()),
        "max": float(scores.max()),
        "min": float(scores.min()),
        "positive": float((scores > 0).float().mean()),
        "top_general": _listed(sets.general, mean),
        "top_specific": _listed(sets.specific, best),
    }


def _listed(keep: torch.Tensor, values: torch.Tensor) -> list[dict[str, Any]]:
    ranked = values.masked_fill(~keep, float("-inf")).topk(min(LISTED, int(keep.sum())))
    pairs = zip(ranked.indices.tolist(), ranked.values.tolist(), strict=True)
    return [{"neuron": neuron, "score": score} for neuron, score in pairs]


def _named(scores: Mapping[int, Scores], shown: int) -> dict[Neuron, list[str]]:
    """The neurons worth describing: the first of each kind over all layers, with their kinds."""
    found: dict[Neuron, list[str]] = {}
    for kind, sets in (("general", top_general(scores, shown)), ("specific", top_specific(scores, shown))):
        for layer, keep in sets.items():
            for index in keep.nonzero().flatten().tolist():
                found.setdefault((layer, index), []).append(kind)
    return found


def _described(
    model: EditableModel, named: Mapping[Neuron, list[str]], found: Survey, texts: Sequence[str]
) -> list[dict[str, Any]]:
    neurons = list(named)
    words = promoted_tokens(model, neuron_values(model, neurons)) if neurons else []
    prompts = [model.tokenizer.decode(list(row.ids), skip_special_tokens=True) for row in found.prompts.rows]
    excited = exciting_prompts(model, neurons, [*dict.fromkeys([*prompts, *texts])]) if neurons else {}
    described = [
        {
            "layer": layer,
            "neuron": index,
            "kinds": named[layer, index],
            "scores": {name: _summary(scores[layer][:, index]) for name, scores in found.scores.items()},
            "promotes": [{"token": token, "logit": logit} for token, logit in said.positive],
            "promotes_when_negative": [{"token": t, "logit": logit} for t, logit in said.negative],
            "excited_by": [asdict(place) for place in excited[layer, index]],
        }
        for (layer, index), said in zip(neurons, words, strict=True)
    ]
    first = next(iter(found.scores))
    return sorted(described, key=lambda one: -one["scores"][first]["max"])


def _summary(scores: torch.Tensor) -> dict[str, float]:
    return {"mean": float(scores.mean()), "max": float(scores.max()), "min": float(scores.min())}
