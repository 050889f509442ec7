"""Which neurons can a layer spare? Neurons are silenced, none is written, and the model is compared with itself.

Per cell: the share of neighbours' answers that stay (teacher-forced, three neighbours each of 50 facts for tuning, 95 %
intervals over facts) and the perplexity of WikiText-2 test, with so many neurons of one layer silenced: those that write
least on ordinary text alone, those that write least there and at its first token (the rule of `nmke`), or random ones.

    python benchmarks/research/silencing.py
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from common import facts
from streams import held_out_perplexity
from torch import Tensor

from nmke.config import EditConfig
from nmke.editors.free_neurons import importance
from nmke.editors.method import Batch
from nmke.evaluation.base_outputs import collect_base
from nmke.evaluation.metrics import mean_interval
from nmke.evaluation.protocols import score
from nmke.models.load import EditableModel, load_model
from nmke.progress import quiet
from nmke.stats.covariance import LayerStats
from nmke.stats.store import CorpusSpec, StatsStore
from nmke.types import EditRequest
from record import write_record

FIRST, FACTS, NEIGHBOURS = 10_500, 50, 3  # CounterFact records for tuning
CELLS = {"smollm2-135m": {16: (100, 768)}, "gemma3-270m": {10: (50, 500), 12: (50, 500)}}
SEEDS = (0, 1)
Json = dict[str, Any]


def orders(model: EditableModel, layer: int) -> dict[str, Tensor]:
    """The neurons of a layer in the order in which each rule gives them up."""
    stats = {
        i: LayerStats(found.moment) for i, found in StatsStore().prepare(model, [layer], CorpusSpec()).items()
    }
    batch = Batch(model, (), (), EditConfig(layers=(layer,)), quiet, stats=stats)
    columns = model.layout.layers[layer].matrix("down").read().double()
    found = {
        "least on ordinary text": (stats[layer].mean_squares * columns.square().sum(dim=0)).argsort(),
        "least there and at its first token": importance(batch, layer).argsort(),
    }
    for seed in SEEDS:
        generator = torch.Generator().manual_seed(seed)
        found[f"random, seed {seed}"] = torch.randperm(columns.shape[1], generator=generator)
    return found


@torch.no_grad()
def cells(model: EditableModel, layer: int, counts: Sequence[int], requests: Sequence[EditRequest]) -> Json:
    """Every rule at every count."""
    base, matrix = collect_base(model, requests), model.layout.layers[layer].matrix("down")
    found: Json = {}
    for rule, order in orders(model, layer).items():
        for count in counts:
            index = order[:count].sort().values
            before = matrix.columns(index)
            matrix.restore(index, torch.zeros_like(before))
            rows = [row["teacher_forced"]["locality"] for row in score(model, requests, base).rows_to_json()]
            found[f"{count}, {rule}"] = {
                "locality": asdict(mean_interval(rows)), "perplexity": held_out_perplexity(model),
            }  # fmt: skip
            matrix.restore(index, before)
    return found


def main() -> None:
    """Measure every cell and write the record."""
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    requests = facts(FIRST, FACTS, neighbours=NEIGHBOURS)
    content: Json = {}
    for name, layers in CELLS.items():
        model = load_model(name)
        content[name] = {"unedited": {"perplexity": held_out_perplexity(model)}}
        for layer, counts in layers.items():
            content[name][f"layer {layer}"] = cells(model, layer, counts, requests)
            for cell, found in content[name][f"layer {layer}"].items():
                shown = f"locality {found['locality']['mean']:.3f}, perplexity {found['perplexity']:.2f}"
                print(f"{name}, layer {layer}: {cell}: {shown}", flush=True)
    setup = {"facts": f"counterfact {FIRST}-", "count": len(requests), "neighbours": NEIGHBOURS}
    print(write_record("research_silencing", {"setup": setup, "models": content}))


if __name__ == "__main__":
    main()
