"""How different are the masks of paraphrases, of facts of one relation, and of different relations?

Thirty CounterFact facts per seed (ten relations, three facts each), every fact asked by its prompt and its two true
paraphrases, each behind three of the contexts that an edit uses. A mask per prompt and layer (4 to 8), drawn as an
edit draws it (union of general and specific), and besides the 153 neurons (10 %) of highest mean score. Jaccard
index of two masks, set against what two random masks of the same sizes would have: 0 means chance, 1 the same.

    python benchmarks/findings/masks_between.py
"""

from __future__ import annotations

import itertools
import random
from collections import defaultdict
from dataclasses import replace

import torch
from common import SEEDS, Json, Lazy, Pieces, estimate, facts

from nmke.config import EditConfig
from nmke.editors.contexts import write_contexts
from nmke.masking.select import keep_top, split_neurons
from nmke.models.load import EditableModel
from nmke.neurons import survey
from nmke.types import EditRequest, Mask
from record import write_record

LAYERS = (4, 5, 6, 7, 8)
RELATIONS, EACH = 10, 3
CONTEXTS = 3
SETTINGS = (("lps", "last"), ("mpc", "subject"))
PAIRS = 300  # most pairs of a kind
TOP = 0.1


def sample(seed: int) -> list[EditRequest]:
    """Facts of the relations that the seed's half holds most of, with their relation."""
    by_relation: dict[str, list[EditRequest]] = defaultdict(list)
    for request in facts(seed, 200):
        if request.relation and len(request.paraphrases) >= 2:
            by_relation[request.relation].append(request)
    most = sorted(by_relation, key=lambda name: -len(by_relation[name]))[:RELATIONS]
    return [request for name in most for request in by_relation[name][:EACH]]


def asked(request: EditRequest) -> list[EditRequest]:
    """The fact by its prompt and by each paraphrase that names the subject once."""
    ways = [request]
    for number, text in enumerate(request.paraphrases[:2]):
        if text.count(request.subject) == 1:
            template = text.replace(request.subject, "{}")
            ways.append(replace(request, prompt=template, id=f"{request.id}.{number}", paraphrases=()))
    return ways


def measure(model: EditableModel, seed: int, metric: str, token: str) -> Json:
    """Jaccard indices above chance of the three kinds of pairs."""
    config = EditConfig.create(attribution_token=token)
    contexts = write_contexts(model)[:CONTEXTS]
    ways = [
        (number, request.relation, way)
        for number, request in enumerate(sample(seed))
        for way in asked(request)
    ]
    found = survey(model, [way for _, _, way in ways], contexts, [metric], config, LAYERS)
    index = torch.tensor(found.facts)
    masks: dict[str, list[dict[int, Mask]]] = {"union": [], "top": []}
    for number in range(len(ways)):
        rows = index == number
        scores = {layer: one[rows] for layer, one in found.scores[metric].items()}
        sets = {layer: split_neurons(one, config) for layer, one in scores.items()}
        masks["union"].append({layer: one.general | one.specific for layer, one in sets.items()})
        masks["top"].append({layer: keep_top(one.double().mean(dim=0), TOP) for layer, one in scores.items()})
    labels = [(fact, relation) for fact, relation, _ in ways]
    return {
        "facts": len({fact for fact, _ in labels}),
        "prompts": len(ways),
        "relations": len({relation for _, relation in labels}),
        **{kind: _kinds(found_masks, labels, seed) for kind, found_masks in masks.items()},
    }


def _kinds(masks: list[dict[int, Mask]], labels: list[tuple[int, str | None]], seed: int) -> Json:
    pairs: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for a, b in itertools.combinations(range(len(labels)), 2):
        if labels[a][0] == labels[b][0]:
            pairs["paraphrases of one fact"].append((a, b))
        elif labels[a][1] == labels[b][1]:
            pairs["facts of one relation"].append((a, b))
        else:
            pairs["different relations"].append((a, b))
    content: Json = {}
    for kind, every in pairs.items():
        chosen = random.Random(seed).sample(every, min(PAIRS, len(every)))
        values = [[jaccard(masks[a][layer], masks[b][layer]) for layer in LAYERS] for a, b in chosen]
        plain = [sum(index for index, _ in row) / len(row) for row in values]
        above = [sum(over for _, over in row) / len(row) for row in values]
        content[kind] = {"jaccard": estimate(plain), "above_chance": estimate(above)}
    return content


def jaccard(a: Mask, b: Mask) -> tuple[float, float]:
    """Jaccard index, and the same with chance at 0 and equality of size-matched masks at 1."""
    size, shared = len(a), float((a & b).sum())
    na, nb = float(a.sum()), float(b.sum())
    expected = na * nb / size
    chance, best = expected / (na + nb - expected), min(na, nb) / max(na, nb)
    index = shared / (na + nb - shared)
    return index, (index - chance) / max(best - chance, 1e-9)


def main() -> None:
    """Measure and write the record."""
    pieces, lazy = Pieces("masks_between"), Lazy()
    cells: Json = {}
    for metric, token in SETTINGS:
        for seed in SEEDS:

            def make(metric: str = metric, token: str = token, seed: int = seed) -> Json:
                return measure(lazy.model, seed, metric, token)

            with pieces.optional():
                found = pieces.get(f"{metric}-{token}-{seed}", make)
                cells.setdefault(f"{metric} at {token}", {})[str(seed)] = found
    setup = {
        "model": "smollm2-135m",
        "layers": list(LAYERS),
        "contexts": CONTEXTS,
        "pairs_per_kind": PAIRS,
        "top": TOP,
    }
    print(write_record("finding_masks_between", {"setup": setup, "missing": pieces.missing, "cells": cells}))


if __name__ == "__main__":
    main()
