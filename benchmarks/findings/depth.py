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
    total = sum(layer.shape[1] for layer in scores.values())
    sizes = [max(1, round(share * total)) for share in SHARES]
    found: Json = {}
    for share, size, profiles in zip(
        SHARES, sizes, depth_profiles(scores, sizes, resamples=RESAMPLES, seed=seed), strict=True
    ):
        both = by_layer_counts(top_general(scores, size), top_specific(scores, size))
        kinds = {kind: asdict(profile) for kind, profile in profiles.items()}
        found[str(share)] = {"neurons": size, "overlap": sum(both), **kinds}
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
    rows = torch.cat([torch.arange(len(table))[None], draws])  # the facts themselves, then the samples
    weights = torch.zeros(len(rows), len(table)).scatter_add_(1, rows, torch.ones_like(rows).float())
    often = weights @ top.float() / len(table)  # [draws, neurons]: share of the facts
    depth = torch.linspace(0, 1, len(sizes), dtype=torch.float64)
    kinds = {"general": often >= OFTEN, "specific": (often > 0) & (often < SELDOM)}
    return {kind: _recurring(keep, owner, depth) for kind, keep in kinds.items()}


def _recurring(keep: torch.Tensor, owner: torch.Tensor, depth: torch.Tensor) -> Json:
    counts = torch.stack([torch.bincount(owner[row], minlength=len(depth)) for row in keep]).double()
    share = counts / counts.sum(dim=1, keepdim=True).clamp(min=1)
    low, high = (share[1:] @ depth).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return {
        "neurons": int(counts[0].sum()),
        "counts": counts[0].int().tolist(),
        "centre": [float(share[0] @ depth), low, high],
        "top_third": float(share[0, 2 * len(depth) // 3 :].sum()),
    }


def main() -> None:
    """Measure and write the record."""
    pieces, lazy = Pieces("depth"), Lazy()
    cells: Json = {}
    for metric, token in METRICS:
        for seed in SEEDS:

            def make(metric: str = metric, token: str = token, seed: int = seed) -> Json:
                scores = surveyed(lazy, seed, FACTS, token, metric)
                return {"ranked": ranked(scores, seed), "recurring": recurring(scores, seed)}

            with pieces.optional():
                found = pieces.get(f"{metric}-{token}-{seed}", make)
                cells.setdefault(f"{metric} at {token}", {})[str(seed)] = found
    setup = {"model": "smollm2-135m", "facts_per_seed": FACTS, "prompts": "bare", "resamples": RESAMPLES}
    print(write_record("finding_depth", {"setup": setup, "missing": pieces.missing, "cells": cells}))


if __name__ == "__main__":
    main()
