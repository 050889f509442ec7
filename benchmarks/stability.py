"""How far does each method move the weights for the same facts? NMKE beside AlphaEdit, layer by layer.

The first 50 records of counterfact_full500 in batches of 10 into smollm2-135m, layers 4-8. After every batch and for
every edited layer: relative norm of the change, Wasserstein distance of the columns' norms, cosine of each column
before and after, largest singular value; after the last one also the scores (a method that writes nothing moves
nothing), the whole spectrum, and the perplexity of held-out text. Controls: AlphaEdit at the lambda of some ports,
random masks of NMKE's size, one mask for a whole batch, NMKE as published.

Runs are kept under build/stability with what was measured beside them, so an interrupted benchmark goes on where it
stopped and a finished run is only read; the same command again.

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
from nmke.facts import data_path, read_facts
from nmke.types import EditRequest
from nmke.viz.run_record import RunRecord, read_run
from record import commit, machine, write_record

MODEL, LAYERS, BATCH = "smollm2-135m", (4, 5, 6, 7, 8), 10
RUNS: dict[str, dict[str, Any]] = {
    "alphaedit": {"method": "alphaedit"},
    "nmke-linear": {"method": "nmke-linear"},
    "nmke-linear, random masks of equal size": {"method": "nmke-linear", "mask": "random"},
    "nmke-linear, one mask per batch": {"method": "nmke-linear", "mask_scope": "batch"},
    "nmke-published": {"method": "nmke-published"},
    "alphaedit, lambda 1": {"method": "alphaedit", "l2": 1.0},
}
WORK = Path("build/stability")
MEASURED = "measured.json"  # in the run folder
SPECTRUM_POINTS = 96


def run(root: Path, settings: dict[str, Any], requests: list[EditRequest], deadline: float) -> None:
    """Edit what is left, measure after every batch, score after the last."""
    from nmke.session import EditSession

    config = EditConfig.create(**settings, layers=LAYERS, batch_size=BATCH, steps=25, on_collapse="continue")
    root.parent.mkdir(parents=True, exist_ok=True)
    with EditSession.open(MODEL, root, config=config) as session:
        kept = read_measured(root) or {"commit": commit(), "machine": machine(), "over_edits": {}}
        for report in session.edit_many(requests, resume=True, stop=lambda: time.monotonic() > deadline):
            edits = sum(len(session.ledger.event(seq).edits) for seq in session.ledger.active())
            kept["over_edits"][str(edits)] = measured(session, spectrum=False)
            write_measured(root, kept)
            print(f"{root.name}: {edits} edits, {sum(report.seconds.values()):.0f} s", flush=True)
        if sum(len(session.ledger.event(seq).edits) for seq in session.ledger.active()) == len(requests):
            kept["layers"] = measured(session, spectrum=True)
            write_measured(root, kept)
            score_once(session, requests)


def measured(session: Any, *, spectrum: bool) -> dict[str, Any]:
    """Every edited layer against its base."""
    from nmke.stability import compare

    found = {}
    for changed in session.changed():
        numbers = compare(*session.weights.before_and_after(changed.place)).as_json()
        for name in ("singular_before", "singular_after"):
            values = numbers.pop(name)
            if spectrum:
                every = max(1, -(-len(values) // SPECTRUM_POINTS))
                numbers[name] = {"every": every, "values": [round(v, 5) for v in values[::every]]}
        found[changed.place.label] = numbers
    return found


def score_once(session: Any, requests: list[EditRequest]) -> None:
    """Teacher-forced scores of the model as it is, kept in the run."""
    from nmke.evaluation.base_outputs import collect_base
    from nmke.evaluation.protocols import score
    from nmke.evaluation.score_records import save_scores

    if teacher_forced(read_run(session.folder.root)) is None:
        with session.base():
            base = collect_base(session.model, requests)
        save_scores(session.folder.root, session.content_hash, requests, score(session.model, requests, base))


def teacher_forced(found: RunRecord) -> dict[str, Any] | None:
    """The run's newest scores of its last state, None without."""
    own = [record for record in found.scores if record.content_hash == found.content_hash]
    return next(
        (r.protocols["teacher_forced"] for r in reversed(own) if "teacher_forced" in r.protocols), None
    )


def cell(root: Path, edits: int) -> dict[str, Any] | None:
    """The finished run as its folder tells it, None when something is missing."""
    kept = read_measured(root)
    if kept is None or "layers" not in kept:
        return None
    found = read_run(root)
    scores = teacher_forced(found)
    if scores is None or not found.batches or found.batches[-1].edits != edits:
        return None
    health = found.last_health
    masks = [detail for batch in found.batches for detail in batch.per_layer("masks").values()]
    shares = [detail.get("kept_per_edit", detail["kept"]) / detail["d_mlp"] for detail in masks]
    return {
        "settings": found.config,
        "scores": {"teacher_forced": scores},
        "neurons_kept": sum(shares) / len(shares) if shares else None,
        "kl": health["kl"],
        "perplexity": [health["perplexity_base"], health["perplexity"]],
        "content_hash": found.content_hash,
        **kept,
    }


def read_measured(root: Path) -> dict[str, Any] | None:
    """What was measured of a run, None before the first batch."""
    path = root / MEASURED
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None


def write_measured(root: Path, kept: dict[str, Any]) -> None:
    """Keep it beside the run."""
    (root / MEASURED).write_text(json.dumps(kept), encoding="utf-8")


def show(name: str, found: dict[str, Any]) -> None:
    """One line on a cell."""
    scores = found["scores"]["teacher_forced"]
    layers = "  ".join(
        f"{layer}: {n['relative_norm']:.2%} W {n['wasserstein']:.2e} cos {n['cosine_mean']:.4f}"
        for layer, n in found["layers"].items()
    )
    told = " ".join(
        f"{metric[:3]} {scores[metric]:.3f}" for metric in ("reliability", "generalization", "locality")
    )
    print(f"{name:34s} {told}  {layers}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--edits", type=int, default=50)
    parser.add_argument("--only", nargs="*", default=list(RUNS))
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no batch after so long")
    asked = parser.parse_args()
    deadline = time.monotonic() + asked.seconds
    facts = data_path("counterfact_full500.jsonl")
    if facts is None:
        sys.exit("counterfact_full500.jsonl not found; point NMKE_DATA at a folder that holds it")
    requests = list(read_facts(facts, limit=asked.edits).requests)
    folders = {name: WORK / name.replace(", ", "_").replace(" ", "-") for name in RUNS}
    for name in asked.only:
        if cell(folders[name], asked.edits) is None and time.monotonic() < deadline:
            run(folders[name], RUNS[name], requests, deadline)
        cells = {n: found for n, root in folders.items() if (found := cell(root, asked.edits)) is not None}
        if name not in cells:
            print(f"{name}: not finished; the same command goes on")
            continue
        show(name, cells[name])
        setup = {
            "model": MODEL,
            "facts": "counterfact_full500, first records",
            "edits": asked.edits,
            "batch_size": BATCH,
            "layers": list(LAYERS),
            "protocol": "teacher_forced, after the last edit; true paraphrases",
            "held_out_text": "the package's own sentences, as in the health check",
        }
        write_record("stability", {"setup": setup, "cells": cells})


if __name__ == "__main__":
    main()
