"""Every method once: 10 CounterFact facts in one batch on smollm2-135m, scored behind it.

A check that each baseline runs and edits at all, not a comparison: ten facts say little about the order of methods.
Each row has its method's own defaults; `--steps` lowers the steps of all for a quicker look. Rel, Gen and Loc are
teacher-forced token accuracy on the prompt, on true paraphrases, and agreement with the unedited model on neighbours.

    python benchmarks/baselines_smoke.py [--only NAME ...] [--steps N] [--limit 10] [--seconds S]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nmke.config import EditConfig
from nmke.editors import methods, stabilisers
from nmke.evaluation.base_outputs import BaseOutputs, collect_base
from nmke.evaluation.protocols import score
from nmke.facts import data_path, read_facts
from nmke.models.load import EditableModel, load_model
from nmke.session import EditSession
from nmke.types import EditRequest
from record import RESULTS, write_record

FIRST = 130  # records 100-129 of counterfact_full500 were used for tuning
HOST = {"hse": "memit-memory"}  # stabilisers are tried on AlphaEdit, where it is not this


def rows() -> dict[str, dict[str, Any]]:
    """Settings of every row by name: all methods, and every stabiliser on one of them."""
    found: dict[str, dict[str, Any]] = {name: {"method": name} for name in methods.names()}
    for name in stabilisers.names():
        host = HOST.get(name, "alphaedit")
        found[f"{host} + {name}"] = {"method": host, "stabilisers": (name,)}
    return found


def run(
    model: EditableModel, facts: Sequence[EditRequest], base: BaseOutputs, config: EditConfig
) -> dict[str, Any]:
    """One batch (or as many as the method's largest batch asks for), and its scores."""
    with (
        tempfile.TemporaryDirectory() as folder,
        EditSession.open(model, Path(folder) / "run", config=config) as session,
    ):
        start = time.perf_counter()
        reports = list(session.edit_many(facts))
        seconds = time.perf_counter() - start
        scores = score(model, facts, base).to_json()["teacher_forced"]
        steps = [record.detail.get("steps", 0) for report in reports for record in report.records]
        return {
            "scores": scores,
            "layers": list(session.config.layers or ()),
            "batches": len(reports),
            "steps": max(steps),
            "lr": session.config.lr,
            "seconds_per_edit": seconds / len(facts),
            "drift": {str(layer): value for layer, value in session.weights.drift().items()},
        }


def recorded(path: Path) -> dict[str, Any]:
    """The rows of the record so far."""
    return dict(json.loads(path.read_text(encoding="utf-8"))["rows"]) if path.exists() else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", help="rows by name; all when left out")
    parser.add_argument("--limit", type=int, default=10)
    parser.add_argument(
        "--steps", type=int, help="steps of every method, for a quick look that is not recorded"
    )
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no row after so long")
    asked = parser.parse_args()
    path, model = data_path("counterfact_full500.jsonl"), load_model("smollm2-135m")
    if path is None:
        sys.exit("counterfact_full500.jsonl not found; point NMKE_DATA at a folder that holds it")
    facts = read_facts(path, offset=FIRST, limit=asked.limit).requests
    base = collect_base(model, facts)
    written = RESULTS / "baselines_smoke.json"
    kept = recorded(written)
    start = time.perf_counter()
    for name, settings in rows().items():
        late = time.perf_counter() - start > asked.seconds
        if late or (name not in asked.only if asked.only else name in kept and asked.steps is None):
            continue
        largest = methods.get(settings["method"]).max_batch or asked.limit
        quick = {} if asked.steps is None else {"steps": asked.steps}
        config = EditConfig.create(
            **{**settings, **quick}, batch_size=largest, on_collapse="continue", health_every=0
        )
        found = run(model, facts, base, config)
        shown = " ".join(
            f"{metric[:3]} {found['scores'][metric]:.3f}"
            for metric in ("reliability", "generalization", "locality")
        )
        print(
            f"{name:28s} {shown}  {found['steps']} steps, {found['seconds_per_edit']:.2f} s/edit", flush=True
        )
        if asked.steps is None:
            kept = {**recorded(written), name: found}
            ordered = {row: kept[row] for row in rows() if row in kept}
            setup = {
                "model": "smollm2-135m",
                "facts": f"counterfact_full500, {asked.limit} records from record {FIRST}, one batch",
                "protocol": "teacher_forced, behind the batch; true paraphrases",
            }
            write_record("baselines_smoke", {"setup": setup, "rows": ordered})


if __name__ == "__main__":
    main()
