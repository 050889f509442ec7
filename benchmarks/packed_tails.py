"""Target values of real facts, tails packed and tails padded in turn: seconds, and how far the deltas differ.

Tails are padded to the longest of their group, so what packing saves depends on how unlike the facts' lengths are:
made-up facts of one length show nothing.

    python benchmarks/packed_tails.py [--model smollm2-135m] [--facts 10] [--repeats 2] [--threads 1]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from typing import Any

import torch

from nmke.config import EditConfig
from nmke.editors import methods
from nmke.editors.contexts import write_contexts
from nmke.editors.rows import with_second_anchors
from nmke.editors.targets import Targets, optimise_targets
from nmke.facts import data_path, read_facts
from nmke.models.load import EditableModel, load_model
from nmke.models.replay import replay_is_exact
from nmke.types import EditRequest
from record import write_record

FILES = {"counterfact": "counterfact.jsonl.gz", "zsre": "zsre.jsonl"}
LAYER = {"nmke": 16, "alphaedit": 8}  # of smollm2-135m, where each method's targets live


def sought(
    model: EditableModel, asked: list[EditRequest], contexts: tuple[str, ...], method: str
) -> tuple[Targets, float]:
    """Targets by the method's own settings, and the CPU seconds of all threads."""
    config = methods.get(method).fill(EditConfig.create(method=method))
    requests, _ = with_second_anchors(model, asked)
    begun = time.process_time()
    found = optimise_targets(model, requests, contexts, (LAYER[method],), "block", config)
    return found, time.process_time() - begun


def compare(
    model: EditableModel, asked: list[EditRequest], contexts: tuple[str, ...], method: str, repeats: int
) -> dict[str, Any]:
    """Both ways in turn, `repeats` times after one run that is not counted."""
    assert replay_is_exact(model) and model.packable
    sought(model, asked[:2], contexts, method)
    cpu: dict[bool, list[float]] = {True: [], False: []}
    wall: dict[bool, list[float]] = {True: [], False: []}
    last: dict[bool, Targets] = {}
    for packed in [True, False] * repeats:
        model.packable = packed
        last[packed], seconds = sought(model, asked, contexts, method)
        cpu[packed].append(seconds)
        wall[packed].append(last[packed].seconds)
    model.packable = True
    one, other = (last[packed].deltas[LAYER[method]] for packed in (True, False))
    apart = (one - other).norm(dim=1) / other.norm(dim=1)
    return {
        "method": method,
        "facts": len(asked),
        "steps": sum(last[True].steps),
        "same_steps": last[True].steps == last[False].steps,
        "largest_relative_difference": float(apart.max()),
        **{
            f"{kind}_{name}_per_edit": statistics.median(taken[packed]) / len(asked)
            for kind, taken in (("cpu_seconds", cpu), ("seconds", wall))
            for name, packed in (("packed", True), ("padded", False))
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--facts", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    model = load_model(asked.model)
    contexts = write_contexts(model)
    rows: list[dict[str, Any]] = []
    for name, file in FILES.items():
        path = data_path(file)
        if path is None:
            sys.exit(f"{file} not found; point NMKE_DATA at a folder that holds it")
        facts = list(read_facts(path, limit=asked.facts).requests)
        for method in LAYER:
            rows.append({"data": name, **compare(model, facts, contexts, method, asked.repeats)})
            print(rows[-1], flush=True)
            written = write_record(
                "packed_tails", {"model": asked.model, "threads": asked.threads, "rows": rows}
            )
    print(written)


if __name__ == "__main__":
    main()
