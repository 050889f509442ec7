"""Which neurons can a layer spare? Neurons are silenced, none is written, and the model is compared with itself.

Per cell: the share of neighbours' answers that stay (teacher-forced, at most three neighbours of each fact, 95 %
intervals over facts; CounterFact facts for tuning, ZsRE facts that nothing was tuned on) and the perplexity of WikiText-2
test, with so many neurons of one layer silenced: those that write least on ordinary text alone, those that write least
there and at its first token (the rule of `nmke`), or random ones. Cells of other models and counts stay in the record.

    python benchmarks/research/silencing.py [--model smollm2-135m] [--layer 16] [--counts 300 768]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from common import COUNTERFACT, facts
from streams import held_out_perplexity
from torch import Tensor

from nmke.config import EditConfig
from nmke.editors.free_neurons import importance
from nmke.editors.method import Batch
from nmke.evaluation.base_outputs import BaseOutputs, collect_base
from nmke.evaluation.metrics import Estimate, mean_interval
from nmke.evaluation.protocols import score
from nmke.models.load import EditableModel, load_model
from nmke.progress import quiet
from nmke.stats.covariance import LayerStats
from nmke.stats.store import CorpusSpec, StatsStore
from nmke.types import EditRequest
from record import RESULTS, write_record

FACTS = {  # file, first record, how many
    "counterfact": (COUNTERFACT, 10_500, 50),
    "zsre": ("zsre.jsonl", 2_000, 250),
}
NEIGHBOURS = 3
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
def cells(
    model: EditableModel, layer: int, counts: Sequence[int], asked: dict[str, list[EditRequest]]
) -> Iterator[tuple[str, Json]]:
    """Every rule at every count."""
    base = {data: collect_base(model, requests) for data, requests in asked.items()}
    matrix = model.layout.layers[layer].matrix("down")
    for rule, order in orders(model, layer).items():
        for count in counts:
            index = order[:count].sort().values
            before = matrix.columns(index)
            matrix.restore(index, torch.zeros_like(before))
            kept = {data: asdict(locality(model, requests, base[data])) for data, requests in asked.items()}
            yield f"{count}, {rule}", {"locality": kept, "perplexity": held_out_perplexity(model)}
            matrix.restore(index, before)


def locality(model: EditableModel, requests: Sequence[EditRequest], base: BaseOutputs) -> Estimate:
    """The share of neighbours' answers that are as they were."""
    rows = score(model, requests, base).rows_to_json()
    return mean_interval([row["teacher_forced"]["locality"] for row in rows])


def main() -> None:
    """Measure every cell and write the record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--layer", type=int, default=16)
    parser.add_argument("--counts", type=int, nargs="+", default=[100, 300, 768])
    given = parser.parse_args()
    path = RESULTS / "research_silencing.json"
    models: Json = json.loads(path.read_text("utf-8"))["models"] if path.is_file() else {}
    asked = {
        data: [replace(one, paraphrases=()) for one in facts(first, count, file, NEIGHBOURS)]
        for data, (file, first, count) in FACTS.items()
    }
    setup = {"facts": {data: f"{first}-, {count}" for data, (_, first, count) in FACTS.items()}}
    model = load_model(given.model)
    mine = models.setdefault(given.model, {"unedited": {"perplexity": held_out_perplexity(model)}})
    for cell, found in cells(model, given.layer, given.counts, asked):
        mine.setdefault(f"layer {given.layer}", {})[cell] = found
        shown = ", ".join(f"{data} {one['mean']:.3f}" for data, one in found["locality"].items())
        print(f"{given.model}, layer {given.layer}: {cell}: {shown}, {found['perplexity']:.2f}", flush=True)
        write_record("research_silencing", {"setup": {**setup, "neighbours": NEIGHBOURS}, "models": models})


if __name__ == "__main__":
    main()
