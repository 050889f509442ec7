"""Which cheap score tells best which neurons matter? Rank correlation with ablation, stability, cost.

The truth: what the model's own answer loses in log-probability when one neuron is silent at the scored token,
for 192 neurons drawn at random from each of six layers (four at the
subject), 12 CounterFact facts per seed, bare prompts. Each metric
is compared with it per fact and layer: Spearman correlation (signed, and of sizes), and recall of the truth's
top 10 % (chance is 10 %). Stability: Spearman correlation of a metric's scores between a fact's prompt and its two
paraphrases, set against that between different facts of other relations. Cost: CPU seconds per prompt for one layer.

    python benchmarks/findings/metrics.py
"""

from __future__ import annotations

import time
from functools import partial

import torch
from common import SEEDS, Json, Lazy, Pieces, estimate, facts
from masks_between import asked

from nmke.attribution import neuron_scores
from nmke.attribution.ablation import ablate
from nmke.config import EditConfig
from nmke.neurons import survey
from nmke.neurons.agreement import spearman, top_recall
from nmke.types import Scores
from record import write_record

LAYERS = {"last": (2, 5, 8, 14, 20, 27), "subject": (2, 5, 8, 14)}  # a subject's token matters early
FACTS, NEURONS, TOP = 12, 192, 0.1
CHEAP = ("lps", "psa", "mpc", "contribution", "gradient", "integrated")
COST_LAYER, COSTED = 8, 32  # neurons silenced to time ablation
PARAPHRASED = 25
STABLE_LAYERS = (5, 8)


def truth(lazy: Lazy, seed: int, token: str, layer: int) -> Json:
    """Every metric against ablation in one layer."""
    config = EditConfig.create(attribution_token=token)
    found = survey(lazy.model, facts(seed, FACTS), ("",), CHEAP, config, [layer])
    generator = torch.Generator().manual_seed(100 * seed + layer)
    chosen = torch.randperm(lazy.model.layout.d_mlp[layer], generator=generator)[:NEURONS].sort().values
    real = ablate(found.readout, layer, chosen)
    scores = {name: found.scores[name][layer][:, chosen] for name in CHEAP}
    scores["coefficient size"] = scores["mpc"].abs()
    scores["random"] = torch.rand(real.shape, generator=generator)
    return {
        "effect": {"mean_abs": float(real.abs().mean()), "max": float(real.max()), "min": float(real.min())},
        "metrics": {name: compared(one, real) for name, one in scores.items()},
    }


def compared(scores: Scores, real: Scores) -> Json:
    """One value per fact."""
    return {
        "signed": spearman(scores, real).tolist(),
        "size": spearman(scores.abs(), real.abs()).tolist(),
        "top_recall": top_recall(scores, real, TOP).tolist(),
        "top_recall_size": top_recall(scores.abs(), real.abs(), TOP).tolist(),
    }


def cost(lazy: Lazy, token: str) -> Json:
    """CPU seconds per prompt of every metric, for one layer; all layers in one pass for the gradient."""
    layer, content = COST_LAYER, {}
    config = EditConfig.create(attribution_token=token)
    found = survey(lazy.model, facts(0, FACTS), ("",), (), config, [layer])
    for name in CHEAP:
        start = time.process_time()
        neuron_scores.get(name)(found.readout, layer, config.amplification)
        content[name] = (time.process_time() - start) / FACTS
    start = time.process_time()
    ablate(found.readout, layer, torch.arange(COSTED))
    each = lazy.model.layout.d_mlp[layer] / COSTED
    return {
        "layer": layer,
        "cpu_seconds": content | {"ablation": (time.process_time() - start) / FACTS * each},
    }


def stability(lazy: Lazy, seed: int, token: str) -> Json:
    """Likeness of a metric's scores over paraphrases, and over other facts."""
    requests = [r for r in facts(seed, 200) if len(asked(r)) == 3][:PARAPHRASED]
    config = EditConfig.create(attribution_token=token)
    ways = [way for request in requests for way in asked(request)]
    found = survey(lazy.model, ways, ("",), CHEAP, config, STABLE_LAYERS)
    content: Json = {}
    first, others = torch.arange(0, len(ways), 3), torch.arange(len(ways)).reshape(-1, 3)[:, 1:]
    for name in CHEAP:
        same, different = [], []
        for layer in STABLE_LAYERS:
            scores = found.scores[name][layer]
            same.append(
                torch.stack([spearman(scores[first], scores[others[:, i]]) for i in (0, 1)]).mean(dim=0)
            )
            different.append(spearman(scores[first], scores[first.roll(1)]))
        content[name] = {
            "paraphrases": estimate(torch.stack(same).mean(dim=0).tolist()),
            "other_facts": estimate(torch.stack(different).mean(dim=0).tolist()),
        }
    return {"facts": len(requests), "metrics": content}


def estimated(found: Json) -> Json:
    """The values per fact as means with intervals."""
    metrics = {
        name: {measure: estimate(values) for measure, values in one.items()}
        for name, one in found["metrics"].items()
    }
    return {"effect": found["effect"], "metrics": metrics}


def main() -> None:
    """Measure and write the record."""
    pieces, lazy = Pieces("metrics"), Lazy()
    cells: Json = {}
    for token, layers in LAYERS.items():
        cell: Json = {"truth": {}, "stability": {}}
        cells[token] = cell
        with pieces.optional():
            cell["cost"] = pieces.get(f"cost-{token}", partial(cost, lazy, token))
        for seed in SEEDS:
            for layer in layers:
                with pieces.optional():
                    found = pieces.get(f"{token}-{seed}-{layer}", partial(truth, lazy, seed, token, layer))
                    cell["truth"].setdefault(str(seed), {})[str(layer)] = estimated(found)
            with pieces.optional():
                steady = pieces.get(f"stability-{token}-{seed}", partial(stability, lazy, seed, token))
                cell["stability"][str(seed)] = steady
    setup = {
        "model": "smollm2-135m",
        "facts_per_seed": FACTS,
        "neurons_per_layer": f"{NEURONS} of 1536, drawn at random",
        "layers": {token: list(layers) for token, layers in LAYERS.items()},
        "answer": "the model's own guess at the last token",
        "stability": f"{PARAPHRASED} facts, layers {list(STABLE_LAYERS)}",
        "registered": [entry.name for entry in neuron_scores],
    }
    print(write_record("finding_metrics", {"setup": setup, "missing": pieces.missing, "cells": cells}))


if __name__ == "__main__":
    main()
