"""Neurons of their own: what if every fact rewrites one little-used neuron, its input as well as its output?

The neuron of a fact reads u·x, where u is the direction that tells the MLP's input at the fact's last subject token from
ordinary text and from other subjects (uncentred second moment A, u = A⁻¹x̄ scaled to u·x̄ = 1). A constant
direction c = A⁻¹μ (c·x is 1 within a per cent on every token) serves as a bias: gate row α(u - θc), up row
((2-θ)c - u)/(1-θ), so that the coefficient is nothing below u·x = θ and flat around 1. The down column is the
delta that the fact's target optimisation asks for, over the coefficient. Neurons are taken by least importance
on ordinary text, E[k²]·‖w‖², or at random (the control). Beside it: joint targets solved in the columns of layers 4 to
8, with all neurons and with a mask per edit. Facts, neighbours and paraphrases as in edit_masks.py; scored after
the last edit; products of what is not edited run in bfloat16.

    python benchmarks/research/own_neurons.py [--edits 60] [--only "own, least used" ...] [--name own_neurons]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from common import CHUNK, KEPT, facts, wanted
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nmke.config import EditConfig
from nmke.editors import methods
from nmke.editors.contexts import write_contexts
from nmke.editors.memory import KeyMemory
from nmke.editors.nmke import OwnNeurons
from nmke.editors.per_edit import meet_residuals, write_directions
from nmke.editors.rows import prompt_rows, with_second_anchors
from nmke.editors.targets import optimise_targets
from nmke.evaluation.base_outputs import collect_base
from nmke.evaluation.held_out import read_articles, wikitext_path
from nmke.evaluation.perplexity import perplexity
from nmke.evaluation.protocols import score
from nmke.masking.per_edit import key_scores, select_per_edit
from nmke.models.load import EditableModel, load_model
from nmke.models.tokens import length_buckets, pad_batch
from nmke.models.tracing import record_inputs, stop_after
from nmke.stats.covariance import LayerStats
from nmke.stats.store import CorpusSpec, StatsStore
from nmke.types import EditRequest
from record import RESULTS, write_record

FIRST = 11_000  # CounterFact records for tuning; no table of results uses them
OWN_LAYERS = (4, 5, 6, 7, 8, 9)  # each fact has its neuron in one of them, in turn
SOLVED_LAYERS = (4, 5, 6, 7, 8)
THRESHOLD, SHARPNESS = 0.5, 16.0
CORPUS = CorpusSpec("self", 30_000)
SCORED, NEIGHBOURS = 150, 3
HELD_OUT_TOKENS = 3_000


@dataclass(frozen=True)
class OwnTargets:
    """One delta per fact (and second anchor), for the layer that is its turn.

    Args:
        requests: Facts and second anchors.
        owners: Index of the fact each belongs to.
        deltas: What the layer is to add, [requests, d_model].
    """

    requests: list[EditRequest]
    owners: list[int]
    deltas: Tensor

    def layer(self, row: int) -> int:
        """Where the row's neuron stands."""
        return OWN_LAYERS[self.owners[row] % len(OWN_LAYERS)]


def own_targets(model: EditableModel, requests: Sequence[EditRequest], contexts: Sequence[str]) -> OwnTargets:
    """Targets of single layers on the unedited model, kept between runs; layers write the stream directly."""
    config = methods.get("nmke-linear").fill(
        EditConfig.create(method="nmke-linear", layers=OWN_LAYERS, lr=0.5)
    )
    folder = KEPT / f"own-{FIRST}-{'-'.join(map(str, OWN_LAYERS))}"
    folder.mkdir(parents=True, exist_ok=True)
    every: list[EditRequest] = []
    owners: list[int] = []
    deltas: list[Tensor] = []
    for start in range(0, len(requests), CHUNK):
        part, part_owners = with_second_anchors(model, requests[start : start + CHUNK])
        found = OwnTargets(
            list(part), [owner + start for owner in part_owners], torch.zeros(len(part), model.layout.d_model)
        )
        path = folder / f"{start:05d}.safetensors"
        if not path.is_file():
            for layer in OWN_LAYERS:
                mine = [row for row in range(len(part)) if found.layer(row) == layer]
                asked = [part[row] for row in mine]
                found.deltas[mine] = optimise_targets(
                    model, asked, contexts, (layer,), "block", config
                ).deltas[layer]
            save_file({"deltas": found.deltas}, path)
            print(f"{folder.name} {start + CHUNK} of {len(requests)}", flush=True)
        every += found.requests
        owners += found.owners
        deltas.append(load_file(path)["deltas"])
    return OwnTargets(every, owners, torch.cat(deltas))


@torch.inference_mode()
def input_statistics(model: EditableModel) -> dict[int, Tensor]:
    """E[x₁ x₁ᵀ] of the MLPs' inputs with a one below, on text the model wrote itself without position 0, per layer."""
    texts = StatsStore().corpus(model, CORPUS).texts
    gates = {layer: _gate(model, layer) for layer in OWN_LAYERS}
    size = model.layout.d_model + 1
    total = {layer: torch.zeros(size, size, dtype=torch.float64) for layer in gates}
    count = 0
    for ids in (model.encoder.encode(text)[:256] for text in texts[:80]):
        batch = pad_batch([ids], model.encoder.pad_id)
        with record_inputs(gates) as seen, stop_after(model.layout.layers[OWN_LAYERS[-1]].block):
            model.model(**model.inputs(batch))
        for layer in gates:
            inputs = nn.functional.pad(seen[layer][0, 1:].double(), (0, 1), value=1.0)
            total[layer] += inputs.T @ inputs
        count += len(ids) - 1
    return {layer: each / count for layer, each in total.items()}


@torch.inference_mode()
def subject_inputs(
    model: EditableModel, requests: Sequence[EditRequest], contexts: Sequence[str]
) -> tuple[dict[int, Tensor], Tensor]:
    """The MLPs' inputs at the subject's last token of every row, per layer, and the request of each row."""
    rows = [
        (number, row)
        for number, request in enumerate(requests)
        for row in prompt_rows(model, request, contexts)
    ]
    found = {layer: torch.empty(len(rows), model.layout.d_model) for layer in OWN_LAYERS}
    gates = {layer: _gate(model, layer) for layer in OWN_LAYERS}
    for bucket in length_buckets([row.anchor + 1 for _, row in rows], 3000):
        batch = pad_batch(
            [list(rows[i][1].ids[: rows[i][1].anchor + 1]) for i in bucket], model.encoder.pad_id
        )
        with record_inputs(gates) as seen, stop_after(model.layout.layers[OWN_LAYERS[-1]].block):
            model.model(**model.inputs(batch))
        for layer in OWN_LAYERS:
            found[layer][bucket] = seen[layer][torch.arange(len(bucket)), batch.last_index]
    return found, torch.tensor([number for number, _ in rows])


def _gate(model: EditableModel, layer: int) -> nn.Linear:
    return model.layout.layers[layer].block.mlp.gate_proj  # type: ignore[union-attr,return-value]


@torch.no_grad()
def write_own(
    model: EditableModel,
    targets: OwnTargets,
    rows: tuple[dict[int, Tensor], Tensor],
    text: dict[int, Tensor],
    keys: dict[int, LayerStats],
    *,
    scale: float = 1.0,
    random_seed: int | None = None,
) -> None:
    """Give every fact its neuron."""
    inputs, owner = rows
    for layer in OWN_LAYERS:
        mine = [row for row in range(len(targets.owners)) if targets.layer(row) == layer]
        x = inputs[layer].double()
        mean = torch.stack(
            [0.5 * x[owner == e][0] + 0.5 * x[owner == e].mean(dim=0) for e in range(len(targets.owners))]
        )
        u, c = (every[mine] for every in OwnNeurons().detectors(mean, torch.eye(len(mean)), text[layer]))
        gate, up = SHARPNESS * (u - THRESHOLD * c), ((2 - THRESHOLD) * c - u) / (1 - THRESHOLD)
        coefficients = nn.functional.silu(x @ gate.T) * (x @ up.T)
        full = torch.stack([coefficients[owner == e, place].max() for place, e in enumerate(mine)])
        down = model.layout.layers[layer].down_proj.weight
        importance = keys[layer].moment.diagonal() * down.double().square().sum(dim=0)
        if random_seed is not None:
            importance = torch.rand(
                len(importance), generator=torch.Generator().manual_seed(random_seed + layer)
            )
        chosen = importance.argsort()[: len(mine)]
        mlp = model.layout.layers[layer].block.mlp
        mlp.gate_proj.weight[chosen] = gate.float()  # type: ignore[union-attr,operator,index]
        mlp.up_proj.weight[chosen] = up.float()  # type: ignore[union-attr,operator,index]
        down[:, chosen] = (scale * targets.deltas[mine].double().T / full).float()  # type: ignore[index]


@torch.no_grad()
def write_solved(
    model: EditableModel, requests: Sequence[EditRequest], keys: dict[int, LayerStats], **settings: Any
) -> None:
    """Joint targets, solved at once in the columns of the down-projections."""
    asked = wanted(model, f"cf{FIRST}", facts(FIRST, 1000), SOLVED_LAYERS, ready=True).of(
        range(len(requests))
    )
    config = methods.get("nmke-linear").fill(
        EditConfig.create(method="nmke-linear", layers=SOLVED_LAYERS, **settings)
    )
    for layer in SOLVED_LAYERS:
        own = asked.keys[layer]
        directions = write_directions(own, keys[layer], KeyMemory.empty(own.shape[1]), config)
        scores = key_scores.get(config.attribution)(own, directions, keys[layer].mean_squares)
        keep = select_per_edit(scores, config, config.seed + layer).keep
        solved = meet_residuals(directions * keep, own, config.residual_ridge)
        model.layout.layers[layer].down_proj.weight += (asked.deltas[layer].T @ solved).float()


@contextmanager
def kept_weights(model: EditableModel) -> Iterator[None]:
    """The model as it was, afterwards."""
    places = [
        p for layer in {*OWN_LAYERS, *SOLVED_LAYERS} for p in model.layout.layers[layer].mlp.parameters()
    ]
    before = [place.detach().clone() for place in places]
    try:
        yield
    finally:
        with torch.no_grad():
            for place, saved in zip(places, before, strict=True):
                place.copy_(saved)


def halve_products(model: EditableModel) -> None:
    """Run the linear layers that are never edited here in bfloat16: the comparison is between cells."""
    edited = {p for layer in {*OWN_LAYERS, *SOLVED_LAYERS} for p in model.layout.layers[layer].mlp.modules()}
    for module in model.model.modules():
        if isinstance(module, nn.Linear) and module not in edited:
            half = module.weight.detach().bfloat16()
            module.forward = lambda x, half=half: nn.functional.linear(x.bfloat16(), half).float()  # type: ignore[method-assign]


def earlier_cells(name: str, setup: dict[str, Any]) -> dict[str, Any]:
    """The cells of a record that was made under the same setup, so that cells can be run apart."""
    path = RESULTS / f"{name}.json"
    record = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return dict(record["cells"]) if record.get("setup") == json.loads(json.dumps(setup)) else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--edits", type=int, default=60)
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--name", default="own_neurons")
    asked = parser.parse_args()
    model = load_model("smollm2-135m")
    requests = [replace(r, neighborhood=r.neighborhood[:NEIGHBOURS]) for r in facts(FIRST, 1000)][
        : asked.edits
    ]
    contexts = write_contexts(model)
    layers = sorted({*OWN_LAYERS, *SOLVED_LAYERS})
    keys = {i: LayerStats(total.moment) for i, total in StatsStore().prepare(model, layers, CORPUS).items()}
    targets = own_targets(model, requests, contexts)
    rows, text = subject_inputs(model, targets.requests, contexts), input_statistics(model)
    own = partial(write_own, model, targets, rows, text, keys)
    solved = partial(write_solved, model, requests, keys)
    cells: dict[str, Callable[[], None]] = {
        "unedited": lambda: None,
        "own, least used": own,
        "own, least used, 1.5 times the delta": partial(own, scale=1.5),
        "own, least used, twice the delta": partial(own, scale=2.0),
        "own, random, seed 0": partial(own, random_seed=0),
        "own, random, seed 1": partial(own, random_seed=1000),
        "solved, no mask": partial(solved, mask="none"),
        "solved, mask per edit": solved,
        "solved, random mask per edit, seed 0": partial(solved, mask="random"),
    }
    halve_products(model)
    scored = requests[:: max(1, len(requests) // SCORED)][:SCORED]
    base, articles = collect_base(model, scored), read_articles(wikitext_path())  # type: ignore[arg-type]
    setup = {
        "model": "smollm2-135m", "facts": f"counterfact {FIRST}-", "edits": len(requests), "scored": len(scored),
        "own_layers": OWN_LAYERS, "solved_layers": SOLVED_LAYERS, "threshold": THRESHOLD, "sharpness": SHARPNESS,
        "protocol": f"teacher_forced, after the last edit; derived paraphrases, {NEIGHBOURS} neighbours",
    }  # fmt: skip
    results = earlier_cells(f"research_{asked.name}", setup)
    for name in asked.only or cells:
        with kept_weights(model):
            cells[name]()
            table = score(model, scored, base)
            after = perplexity(model, articles, max_tokens=HELD_OUT_TOKENS)
        scores = table.to_json()["teacher_forced"]
        results[name] = {"scores": scores, "perplexity": after, "rows": table.rows_to_json()}
        shown = " ".join(f"{scores[m]:.3f}" for m in ("reliability", "generalization", "locality"))
        print(f"{name:38s} {shown}  ppl {after:.2f}", flush=True)
        write_record(f"research_{asked.name}", {"setup": setup, "cells": results})


if __name__ == "__main__":
    main()
