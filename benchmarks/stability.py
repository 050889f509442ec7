"""How far does each method move the weights for the same facts? NMKE beside AlphaEdit, layer by layer.

The first 50 records of counterfact_full500 in batches of 10 into smollm2-135m, layers 4-8. After every batch and for
every edited layer: relative norm of the change, Wasserstein distance of the columns' norms, cosine of each column
before and after, largest singular value; after the last one also the scores (a method that writes nothing moves
nothing), the whole spectrum, and the perplexity of held-out text. Controls: AlphaEdit at the lambda of some ports,
random masks of NMKE's size, one mask for a whole batch, NMKE as published.

Runs are kept under build/stability, so an interrupted benchmark goes on where it stopped; the same command again.

    python benchmarks/stability.py [--edits 50] [--only NAME ...] [--seconds 540]
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from nmke.config import EditConfig
from nmke.evaluation.base_outputs import collect_base
from nmke.evaluation.protocols import score
from nmke.facts import data_path, read_facts
from nmke.session import EditSession
from nmke.stability import compare
from nmke.types import EditRequest
from record import RESULTS, commit, machine, write_record

MODEL, LAYERS, BATCH = "smollm2-135m", (4, 5, 6, 7, 8), 10
RUNS: dict[str, dict[str, Any]] = {
    "alphaedit": {"method": "alphaedit"},
    "nmke": {"method": "nmke"},
    "nmke, random masks of equal size": {"method": "nmke", "mask": "random"},
    "nmke, one mask per batch": {"method": "nmke", "mask_scope": "batch"},
    "nmke-published": {"method": "nmke-published"},
    "alphaedit, lambda 1": {"method": "alphaedit", "l2": 1.0},
}
WORK = Path("build/stability")
SPECTRUM_POINTS = 96


def measured(session: EditSession, *, spectrum: bool) -> dict[str, Any]:
    """Every edited layer against its base."""
    found = {}
    for changed in session.changed():
        numbers = compare(*session.weights.before_and_after(changed.layer)).as_json()
        for name in ("singular_before", "singular_after"):
            values = numbers.pop(name)
            if spectrum:
                step = max(1, len(values) // SPECTRUM_POINTS)
                numbers[name] = {"every": step, "values": [round(v, 5) for v in values[::step]]}
        found[str(changed.layer)] = numbers
    return found


def run(name: str, requests: list[EditRequest], deadline: float) -> dict[str, Any] | None:
    """One method's cell; None when the time was over first."""
    root, config = WORK / name.replace(", ", "_").replace(" ", "-"), RUNS[name]
    settings = EditConfig.create(**config, layers=LAYERS, batch_size=BATCH, steps=25, on_collapse="continue")
    root.parent.mkdir(parents=True, exist_ok=True)
    with EditSession.open(MODEL, root, config=settings) as session:
        points_file, commit_file = root / "points.json", root / "commit.txt"
        if not commit_file.is_file():
            commit_file.write_text(commit(), encoding="utf-8")
        points = json.loads(points_file.read_text(encoding="utf-8")) if points_file.is_file() else {}
        if time.monotonic() > deadline:
            return None
        for report in session.edit_many(requests, resume=True, stop=lambda: time.monotonic() > deadline):
            edits = sum(len(session.ledger.event(seq).edits) for seq in session.ledger.active())
            points[str(edits)] = measured(session, spectrum=False)
            points_file.write_text(json.dumps(points), encoding="utf-8")
            print(f"{name}: {edits} edits, {sum(report.seconds.values()):.0f} s", flush=True)
        events = [session.ledger.event(seq) for seq in session.ledger.active()]
        if sum(len(event.edits) for event in events) < len(requests):
            return None
        points.setdefault(str(len(requests)), measured(session, spectrum=False))
        with session.base():
            base = collect_base(session.model, requests)
        health = events[-1].body["health"]
        masks = [m["kept"] / m["d_mlp"] for event in events for m in event.body["masks"].values()]
        return {
            "settings": session.config.model_dump(mode="json"),
            "scores": score(session.model, requests, base).to_json(),
            "neurons_kept": sum(masks) / len(masks) if masks else None,
            "kl": health["kl"],
            "perplexity": [health["perplexity_base"], health["perplexity"]],
            "layers": measured(session, spectrum=True),
            "over_edits": points,
            "content_hash": session.content_hash,
            "commit": commit_file.read_text(encoding="utf-8"),
            "machine": machine(),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--edits", type=int, default=50)
    parser.add_argument("--only", nargs="*", default=list(RUNS))
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="begin no further batch after so long"
    )
    asked = parser.parse_args()
    deadline = time.monotonic() + asked.seconds
    facts = data_path("counterfact_full500.jsonl")
    if facts is None:
        sys.exit("counterfact_full500.jsonl not found; point NMKE_DATA at a folder that holds it")
    requests = list(read_facts(facts, limit=asked.edits).requests)
    written = RESULTS / "stability.json"
    cells = json.loads(written.read_text(encoding="utf-8"))["cells"] if written.exists() else {}
    for name in asked.only:
        cell = cells.get(name)
        if cell is None or str(asked.edits) not in cell["over_edits"]:
            cell = run(name, requests, deadline)
        if cell is None:
            print(f"{name}: not finished; the same command goes on")
            continue
        cells[name] = cell
        scores = cell["scores"]["teacher_forced"]
        print(f"{name:34s} Rel {scores['reliability']:.3f} Gen {scores['generalization']:.3f} ", end="")
        print(
            f"Loc {scores['locality']:.3f}  " + "  ".join(_line(k, v) for k, v in cell["layers"].items()),
            flush=True,
        )
        setup = {
            "model": MODEL,
            "facts": "counterfact_full500, first records",
            "edits": asked.edits,
            "batch_size": BATCH,
            "layers": list(LAYERS),
            "protocol": "teacher_forced, after the last edit; true paraphrases",
            "held_out_text": "the package's own sentences, as in the health check",
        }
        write_record("stability", {"setup": setup, "cells": {n: cells[n] for n in RUNS if n in cells}})


def _line(layer: str, numbers: dict[str, Any]) -> str:
    return f"{layer}: {numbers['relative_norm']:.2%} W {numbers['wasserstein']:.2e} cos {numbers['cosine_mean']:.4f}"


if __name__ == "__main__":
    main()
