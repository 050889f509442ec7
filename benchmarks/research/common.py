"""What the experiments share: facts for tuning, and targets and keys of each fact on the unedited model, kept on disk.

Targets and keys that are found on the unedited model do not depend on the other facts, so that one collection serves
every experiment that solves them in another way.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from nmke.config import EditConfig
from nmke.editors import methods
from nmke.editors.contexts import write_contexts
from nmke.editors.keys import KeyPass
from nmke.editors.rows import with_second_anchors
from nmke.editors.targets import Targets, optimise_targets
from nmke.facts import data_path, read_facts
from nmke.models.load import EditableModel
from nmke.types import EditRequest, Keys

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(
    0, str(REPOSITORY / "benchmarks")
)  # record.py stands beside this folder; benchmarks are scripts

KEPT = REPOSITORY / "build" / "research"
COUNTERFACT = "counterfact.jsonl.gz"
METRICS = ("reliability", "generalization", "locality")
CHUNK = 25  # facts of a file


def facts(first: int, count: int, file: str = COUNTERFACT, neighbours: int = 4) -> list[EditRequest]:
    """Records of a data file from `first` on, no fact twice, with at most two (derived) paraphrases."""
    path = data_path(file)
    if path is None:
        sys.exit(f"{file} not found; point NMKE_DATA at a folder that holds it")
    found: dict[str, EditRequest] = {}
    for request in read_facts(path, offset=first, limit=2 * count, derived=True).requests:
        short = replace(
            request, paraphrases=request.paraphrases[:2], neighborhood=request.neighborhood[:neighbours]
        )
        found.setdefault(request.fact_key, short)
    return list(found.values())[:count]


@dataclass(frozen=True)
class Wanted:
    """What every layer is to add for each fact, found on the unedited model.

    Args:
        keys: Keys with all of the fact's own deltas in place, per layer, [rows, d_mlp], float64.
        deltas: What the down-projections are to add, per layer, [rows, d_model], float64.
        owners: Index of the fact each row belongs to (a second anchor has a row of its own).
        steps: Forward passes that each row took.
    """

    keys: dict[int, Keys]
    deltas: dict[int, torch.Tensor]
    owners: tuple[int, ...]
    steps: tuple[int, ...]

    def of(self, wanted: Sequence[int]) -> Wanted:
        """The rows of some facts, renumbered in the order given."""
        place = {fact: number for number, fact in enumerate(wanted)}
        rows = [row for row, fact in enumerate(self.owners) if fact in place]
        return Wanted(
            {layer: each[rows] for layer, each in self.keys.items()},
            {layer: each[rows] for layer, each in self.deltas.items()},
            tuple(place[self.owners[row]] for row in rows),
            tuple(self.steps[row] for row in rows),
        )


def joint_targets(
    model: EditableModel,
    requests: Sequence[EditRequest],
    contexts: Sequence[str],
    layers: Sequence[int],
    config: EditConfig,
) -> Targets:
    """Joint targets on the model as it is, of second anchors too."""
    anchored, _ = with_second_anchors(model, requests)
    return optimise_targets(model, anchored, contexts, layers, "down_proj", config)


def wanted(
    model: EditableModel,
    name: str,
    requests: Sequence[EditRequest],
    layers: Sequence[int],
    ready: bool = False,
    **settings: object,
) -> Wanted:
    """Targets and keys of the requests, made in parts that are kept; `ready` takes only the parts that are there."""
    config = methods.get("nmke-linear").fill(
        EditConfig.create(method="nmke-linear", layers=tuple(layers), **settings)
    )
    shown = json.dumps([name, [r.id for r in requests[:CHUNK]], list(layers), settings], sort_keys=True)
    folder = KEPT / f"{name}-{hashlib.sha256(shown.encode()).hexdigest()[:8]}"
    folder.mkdir(parents=True, exist_ok=True)
    contexts = write_contexts(model)
    parts = []
    for start in range(0, len(requests), CHUNK):
        path = folder / f"{start:05d}.safetensors"
        if not path.is_file():
            if ready:
                break
            part = _make(model, requests[start : start + CHUNK], contexts, layers, config)
            save_file(part, path.with_suffix(".part"))
            path.with_suffix(".part").replace(path)
            print(f"{folder.name} {start + CHUNK} of {len(requests)}", flush=True)
        parts.append(load_file(path))
    owners = [part["owners"] + number * CHUNK for number, part in enumerate(parts)]
    return Wanted(
        {i: torch.cat([part[f"keys.{i}"] for part in parts]).double() for i in layers},
        {i: torch.cat([part[f"deltas.{i}"] for part in parts]).double() for i in layers},
        tuple(torch.cat(owners).tolist()),
        tuple(torch.cat([part["steps"] for part in parts]).tolist()),
    )


def _make(
    model: EditableModel,
    requests: Sequence[EditRequest],
    contexts: Sequence[str],
    layers: Sequence[int],
    config: EditConfig,
) -> dict[str, torch.Tensor]:
    anchored, owners = with_second_anchors(model, requests)
    targets = optimise_targets(model, anchored, contexts, layers, "down_proj", config)
    keys, _ = KeyPass(model, anchored, contexts, layers).collect(targets.deltas)
    found = {f"keys.{i}": each.float() for i, each in keys.items()}
    found |= {f"deltas.{i}": each.float().contiguous() for i, each in targets.deltas.items()}
    return found | {"owners": torch.tensor(owners), "steps": torch.tensor(targets.steps)}
