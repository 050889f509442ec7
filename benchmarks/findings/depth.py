"""Do general neurons sit in the top layers and specific ones everywhere?

The claim (NMKE, arXiv:2510.22139): knowledge-general neurons concentrate in the top layers, knowledge-specific
ones are spread evenly. Tested twice. First with the paper's rankings (general: in how many prompts the score is
positive; specific: highest score in any prompt) over the neurons of all layers at once. Then by recurrence: a
neuron belongs to a prompt when it is among the top 1 % of all neurons there; general ones do so in at least half
of the prompts, specific ones in at least one and in fewer than a tenth.
100 CounterFact facts per seed, bare prompts; intervals by resampling facts.

    python benchmarks/findings/depth.py
"""

from __future__ import annotations

from dataclasses import asdict

import torch
from common import SEEDS, Json, Lazy, Pieces, surveyed

from nmke.neurons.depth import by_layer_counts, depth_profiles, top_general, top_specific
from nmke.types import Scores
from record import write_record

FACTS = 100
SHARES = (0.001, 0.01, 0.05)
METRICS = (
    ("lps", "last"),
    ("mpc", "last"),
    ("contribution", "last"),
    ("gradient", "last"),
    ("mpc", "subject"),
)
OFTEN, SELDOM = 0.5, 0.1  # shares of the prompts
RESAMPLES = 200


def ranked(scores: dict[int, Scores], seed: int) -> Json:
    """Depth of the paper's sets at several sizes."""
    found: Json = {}
    total = sum(layer.shape[1] for layer in scores.values())
    for share in SHARES:
        count = max(1, round(share * total))
        profiles = depth_profiles(scores, count, resamples=RESAMPLES, seed=seed)
        both = by_layer_counts(top_general(scores, count), top_specific(scores, count))
        found[str(share)] = {
            "neurons": count,
            "overlap": sum(both),
            **{kind: asdict(profile) for kind, profile in profiles.items()},
        }
    return found


def recurring(scores: dict[int, Scores], seed: int) -> Json:
    """Depth of the neurons that are in most prompts' top 1 %, and of those in very few."""
    table = torch.cat(list(scores.values()), dim=1)
    sizes = [layer.shape[1] for layer in scores.values()]
    owner = torch.cat([torch.full((size,), i) for i, size in enumerate(sizes)])
    top = torch.zeros(table.shape, dtype=torch.bool)
    top.scatter_(1, table.topk(round(0.01 * table.shape[1]), dim=1).indices, True)
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randint(len(table), (RESAMPLES, len(table)), generator=generator)
    depth = torch.linspace(0, 1, len(sizes), dtype=torch.float64)
    found: Json = {}
    kinds = {
        "general": lambda share: share >= OFTEN,
        "specific": lambda share: (share > 0) & (share < SELDOM),
    }
    for kind, wanted in kinds.items():
        keep = wanted(top.float().mean(dim=0))
        counts = torch.bincount(owner[keep], minlength=len(sizes)).double()
        centres = []
        for draw in draws:
            drawn = torch.bincount(
                owner[wanted(top[draw].float().mean(dim=0))], minlength=len(sizes)
            ).double()
            centres.append(float(drawn @ depth / drawn.sum().clamp(min=1)))
        edges = torch.tensor(centres, dtype=torch.float64).quantile(torch.tensor([0.025, 0.975]).double())
        share = counts / counts.sum().clamp(min=1)
        found[kind] = {
            "neurons": int(counts.sum()),
            "counts": counts.int().tolist(),
            "centre": [float(share @ depth), *edges.tolist()],
            "top_third": float(share[2 * len(sizes) // 3 :].sum()),
        }
    return found


def main() -> None:
    """Measure and write the record."""
    pieces, lazy = Pieces("depth"), Lazy()
    cells: Json = {}
    for metric, token in METRICS:
        for seed in SEEDS:

            def make(metric: str = metric, token: str = token, seed: int = seed) -> Json:
                scores = surveyed(lazy, seed, FACTS, token, metric)
                return {"ranked": ranked(scores, seed), "recurring": recurring(scores, seed)}

            cells.setdefault(f"{metric} at {token}", {})[str(seed)] = pieces.get(
                f"{metric}-{token}-{seed}", make
            )
    setup = {"model": "smollm2-135m", "facts_per_seed": FACTS, "prompts": "bare", "resamples": RESAMPLES}
    print(write_record("finding_depth", {"setup": setup, "cells": cells}))


if __name__ == "__main__":
    main()
