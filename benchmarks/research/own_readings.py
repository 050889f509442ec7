"""For whom do a fact's neurons fire? Own subjects, other facts' subjects, neighbours and paraphrases, by how they are read.

Readings of `nmke` are made for 300 facts in batches, as the method makes them, and looked at in the unedited model;
nothing is written. A reading is turned into the neuron's coefficient as a share of its largest one. Per cell: the lowest
and the mean share over a fact's own contexts; the mean share, and how many reach .6, at paraphrases (which put a
sentence of other things in front); how many rows of other subjects, prompts of neighbours and paraphrases
hold a token at which a neuron of another fact reaches .4; and how many neurons of later batches do so at a subject.
Facts that share a subject do not count as others.

    python benchmarks/research/own_readings.py
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from common import facts
from torch import Tensor, nn

from nmke.editors.contexts import write_contexts
from nmke.editors.keys import KeyPass
from nmke.editors.nmke import OwnNeurons
from nmke.evaluation.metrics import mean_interval
from nmke.models.load import EditableModel, load_model
from nmke.models.replay import in_rows
from nmke.models.tokens import pad_batch
from nmke.models.tracing import record_inputs, stop_after
from nmke.stats.store import CorpusSpec, StatsStore
from nmke.types import EditRequest
from record import write_record

FIRST, FACTS = 12_000, 300  # CounterFact records for tuning
STRONG, HIT = 0.6, 0.4
PROMPTS_EVERY, NEIGHBOURS = 3, 2  # prompts of every third fact
Json = dict[str, Any]
CELLS: dict[str, tuple[int, int, OwnNeurons]] = {
    "layer 16, text alone, batches of 100": (16, 100, OwnNeurons(name_share=0.0)),
    "layer 16, text alone, single facts": (16, 1, OwnNeurons(name_share=0.0)),
    "layer 16, batches of 100": (16, 100, OwnNeurons()),
    "layer 16, batches of 10": (16, 10, OwnNeurons()),
    "layer 16, single facts": (16, 1, OwnNeurons()),
    "layer 16, batches of 10, earlier subjects forgotten": (16, 10, OwnNeurons(earlier_weight=0.0)),
    "layer 16, contexts not evened out": (16, 100, OwnNeurons(slack=1e6)),
    "layer 16, threshold 0.5": (16, 100, OwnNeurons(threshold=0.5)),
    "layer 16, threshold 0.6": (16, 100, OwnNeurons(threshold=0.6)),
    "layer 16, threshold 0.7": (16, 100, OwnNeurons(threshold=0.7)),
    "layer 8, batches of 100": (8, 100, OwnNeurons()),
    "layer 12, batches of 100": (12, 100, OwnNeurons()),
    "layer 20, batches of 100": (20, 100, OwnNeurons()),
}


class Seen:
    """What one layer's MLP is given: at the facts' anchors, and at every token of other prompts.

    Args:
        model: The unedited model.
        requests: The facts.
        layer: The layer.
    """

    def __init__(self, model: EditableModel, requests: Sequence[EditRequest], layer: int) -> None:
        self.model, self.layer, self.requests = model, layer, requests
        self.rows = KeyPass(model, requests, write_contexts(model), (layer,))
        self.anchors = self.rows.at_anchors({"x": self._module})["x"]
        some = range(0, len(requests), PROMPTS_EVERY)
        self.prompts = {
            "neighbours": [(i, n.prompt) for i in some for n in requests[i].neighborhood],
            "paraphrases": [(i, text) for i in some for text in requests[i].paraphrases],
        }
        self.tokens = {
            kind: [self._tokens(text) for _, text in prompts] for kind, prompts in self.prompts.items()
        }

    @property
    def _module(self) -> torch.nn.Module:
        return self.model.layout.layers[self.layer].read_in.behind_activation

    @torch.no_grad()
    def _tokens(self, text: str) -> Tensor:
        ids = list(self.model.encoder.encode(text))
        batch = pad_batch([ids], self.model.encoder.pad_id)
        with (
            record_inputs({0: self._module}) as found,
            stop_after(self.model.layout.layers[self.layer].block),
        ):
            self.model.model(**self.model.inputs(batch))
        return in_rows(found[0], 1)[0].double()


def share(inputs: Tensor, u: Tensor, c: Tensor, threshold: float) -> Tensor:
    """The coefficients as a share of that at u·x = c·x = 1, [inputs, facts]."""
    reading, one = inputs @ u.T, inputs @ c.T
    rise, fall = reading - threshold * one, (2 - threshold) * one - reading
    return rise.clamp(min=0) * fall.clamp(min=0) / (1 - threshold) ** 2


def cell(seen: Seen, method: OwnNeurons, batch: int, store: StatsStore) -> Json:
    """The readings of all facts, made batch after batch."""
    spec, rows = CorpusSpec(), seen.rows
    text, names = (
        store.prepare(seen.model, [seen.layer], spec, kind=kind)[seen.layer].moment
        for kind in ("inputs", "subjects")
    )
    moment = (1 - method.name_share) * text + method.name_share * names
    found, earlier = [], None
    means = nn.functional.pad(rows.average(seen.anchors), (0, 1), value=1.0)
    for start in range(0, len(seen.requests), batch):
        weights = rows.weights[start : start + batch]
        mine = weights.sum(dim=0) > 0
        found.append(method.detectors(seen.anchors[mine], weights[:, mine], moment, earlier))
        done = means[: start + batch]
        earlier = done.T @ done
    u, c = (torch.cat(each) for each in zip(*found, strict=True))
    subjects = [request.subject for request in seen.requests]
    same = torch.tensor([[a == b for b in subjects] for a in subjects])
    at = share(seen.anchors, u, c, method.threshold)
    own = at.gather(1, rows.owner[:, None])[:, 0]
    others = at.masked_fill(same[rows.owner], 0.0)
    turn = torch.arange(len(subjects)) // batch
    later = (others > HIT) & (turn > turn[rows.owner, None])
    content: Json = {
        "own": {"mean": float(own.mean()), "lowest": float(own.min())},
        "other_subjects_hit": asdict(mean_interval((others > HIT).any(dim=1).double().tolist())),
        "later_neurons": asdict(mean_interval(later.sum(dim=1).double().tolist())),
    }
    for kind, prompts in seen.prompts.items():
        shares, hits = [], []
        for (fact, text_), tokens in zip(prompts, seen.tokens[kind], strict=True):
            reached = share(tokens, u, c, method.threshold).amax(dim=0)
            named = torch.tensor([subject in text_ for subject in subjects]) | same[fact]
            shares.append(float(reached[fact]))
            hits.append(float(reached.masked_fill(named, 0.0).max() > HIT))
        content[f"{kind}_hit"] = asdict(mean_interval(hits))
        if kind == "paraphrases":
            content["share_at_paraphrases"] = asdict(mean_interval(shares))
            content["strong_at_paraphrases"] = asdict(mean_interval([float(s > STRONG) for s in shares]))
    return content


def main() -> None:
    """Measure every cell and write the record."""
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    model, store = load_model("smollm2-135m"), StatsStore()
    requests = [replace(r, neighborhood=r.neighborhood[:NEIGHBOURS]) for r in facts(FIRST, FACTS)[:FACTS]]
    seen: dict[int, Seen] = {}
    cells: Json = {}
    for name, (layer, batch, method) in CELLS.items():
        if layer not in seen:
            seen[layer] = Seen(model, requests, layer)
        cells[name] = cell(seen[layer], method, batch, store)
        shown = {key: round(value["mean"], 3) for key, value in cells[name].items()}
        print(f"{name:40s} {shown}", flush=True)
    setup = {
        "model": "smollm2-135m", "facts": f"counterfact {FIRST}-", "count": len(requests),
        "hit": HIT, "strong": STRONG, "neighbours": NEIGHBOURS, "prompts": f"of every {PROMPTS_EVERY}rd fact",
    }  # fmt: skip
    print(write_record("research_own_readings", {"setup": setup, "cells": cells}))


if __name__ == "__main__":
    main()
