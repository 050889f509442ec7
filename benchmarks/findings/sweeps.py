"""Temperature, amplification, ratio range and layer choice: what do they change in ratios and masks?

Statistics only, no edit (edit quality of chosen settings: quality.py). 100 CounterFact facts per seed in batches
of ten, bare prompts, the paper's score at the last token, every layer. For each setting: the entropies, the
ratios that follow, the share of neurons kept, and the Jaccard index of the mask with that of the default
setting (temperature 30, amplification 30, the paper's range). Means over batches, with 95 % intervals.

    python benchmarks/findings/sweeps.py
"""

from __future__ import annotations

import torch
from common import SEEDS, Json, Lazy, Pieces, averages, chunks, facts, surveyed

from nmke.attribution import neuron_scores
from nmke.config import EditConfig
from nmke.masking.select import split_neurons
from nmke.neurons import survey
from nmke.types import Scores
from record import write_record

FACTS, FEWER, BATCH = 100, 40, 10  # fewer for amplification, where every setting is scored anew
TEMPERATURES = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 10_000.0)
AMPLIFICATIONS = (1.0, 10.0, 30.0, 100.0, 300.0)
RANGES = ("paper", "released", "fixed")
LAYERS = (4, 8, 27)  # for amplification
DEFAULT = EditConfig.create()


def rows(scores: dict[int, Scores], config: EditConfig, reference: dict[int, Scores]) -> list[Json]:
    """One row per batch: means over the layers."""
    found = []
    for batch in chunks(range(len(next(iter(scores.values())))), BATCH):
        at = torch.tensor(list(batch))
        numbers = [numbers_of(scores[i][at], config, reference[i][at]) for i in scores]
        found.append({name: sum(one[name] for one in numbers) / len(numbers) for name in numbers[0]})
    return found


def numbers_of(scores: Scores, config: EditConfig, reference: Scores) -> Json:
    """Entropies, ratios, share kept and likeness to the default mask of one layer and batch."""
    sets, usual = split_neurons(scores, config), split_neurons(reference, DEFAULT)
    mask, before = sets.general | sets.specific, usual.general | usual.specific
    names = ("general_entropy", "specific_entropy", "general_ratio", "specific_ratio")
    return {
        **{name: sets.detail[name] for name in names},
        "overlap": float((sets.general & sets.specific).sum()) / len(mask),
        "kept": float(mask.float().mean()),
        "jaccard": float((mask & before).sum()) / float((mask | before).sum()),
    }


def temperatures(scores: dict[int, Scores]) -> Json:
    """Every temperature, and every range, on the same scores."""
    content: Json = {}
    for value in TEMPERATURES:
        config = EditConfig.create(temperature=value)
        content[f"temperature {value:g}"] = averages(rows(scores, config, scores))
    for name in RANGES:
        config = EditConfig.create(mask="fixed") if name == "fixed" else EditConfig.create(variant=name)
        content[f"range {name}"] = averages(rows(scores, config, scores))
    for layer, alone in scores.items():
        content[f"layer {layer}"] = averages(rows({layer: alone}, DEFAULT, scores))
    return content


def amplifications(lazy: Lazy, seed: int) -> Json:
    """Every amplification, some layers."""
    found = survey(lazy.model, facts(seed, FEWER), ("",), ["lps"], DEFAULT, LAYERS)
    content: Json = {}
    for value in AMPLIFICATIONS:
        scores = {i: neuron_scores.get("lps")(found.readout, i, value).float() for i in LAYERS}
        content[f"amplification {value:g}"] = averages(rows(scores, DEFAULT, found.scores["lps"]))
    return content


def main() -> None:
    """Measure and write the record."""
    pieces, lazy = Pieces("sweeps"), Lazy()
    cells: Json = {}
    for seed in SEEDS:

        def first(seed: int = seed) -> Json:
            return temperatures(surveyed(lazy, seed, FACTS, "last", "lps"))

        def second(seed: int = seed) -> Json:
            return amplifications(lazy, seed)

        cell: Json = {}
        for name, make in {"temperature": first, "amplification": second}.items():
            with pieces.optional():
                cell |= pieces.get(f"{name}-{seed}", make)
        if cell:
            cell.pop("piece_seconds")
            cells[str(seed)] = cell
    setup = {
        "model": "smollm2-135m",
        "facts_per_seed": FACTS,
        "batch": BATCH,
        "score": "lps at the last token",
        "amplification": f"{FEWER} facts per seed, layers {list(LAYERS)}",
    }
    print(write_record("finding_sweeps", {"setup": setup, "missing": pieces.missing, "cells": cells}))


if __name__ == "__main__":
    main()
