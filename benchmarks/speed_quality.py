"""Speed and quality of 50 CounterFact edits in batches of 10, scored after the last edit.

Runs the command line itself, one process per method, so that seconds and peak memory are those of a user:
smollm2-135m, each method's own layers, at most 25 steps, the first 50 records of counterfact_full500 (two true paraphrases
and ten neighbours each). Settings were tuned on other records. Controls: random neurons, no mask, masks per edit and per
batch in a linear solve, NMKE as published, AlphaEdit without bfloat16 products.

    python benchmarks/speed_quality.py [--limit 50] [--only NAME ...] [--keep]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from nmke.bench.machine import machine
from nmke.facts import data_path
from record import RESULTS, write_record

RUNS: dict[str, list[str]] = {
    "alphaedit": ["--method", "alphaedit"],
    "nmke": ["--method", "nmke"],
    "nmke, random neurons": ["--method", "nmke", "--mask", "random"],
    "nmke, no mask": ["--method", "nmke", "--mask", "none"],
    "nmke-linear": ["--method", "nmke-linear"],
    "nmke-linear, random masks of equal size": ["--method", "nmke-linear", "--mask", "random"],
    "nmke-linear, one mask per batch": ["--method", "nmke-linear", "--mask-scope", "batch"],
    "nmke-linear, one random mask per batch": [
        "--method",
        "nmke-linear",
        "--mask-scope",
        "batch",
        "--mask",
        "random",
    ],
    "nmke-published": ["--method", "nmke-published"],
    "memit-memory": ["--method", "memit-memory"],
    "alphaedit, float32 products": ["--method", "alphaedit", "--products", "float32"],
}
KEPT = (
    "n_edits",
    "n_written",
    "n_failed",
    "seconds_per_edit",
    "seconds",
    "peak_rss_mb",
    "scores",
    "content_hash",
)


def run(facts: Path, limit: int, flags: list[str], folder: Path) -> dict[str, Any]:
    """One edit run; its closing JSON object, shortened."""
    command = [
        sys.executable,
        "-m",
        "nmke",
        "edit",
        "smollm2-135m",
        "--facts",
        str(facts),
        "--limit",
        str(limit),
    ]
    command += [
        "--batch-size",
        "10",
        "--steps",
        "25",
        "-o",
        str(folder),
        "--json",
        *flags,
    ]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result = json.loads(done.stdout)
    return {**{name: result[name] for name in KEPT if name in result}, **mask_shares(folder)}


def mask_shares(folder: Path) -> dict[str, float | None]:
    """Mean share of neurons that a batch and a single edit may write into; None without a mask."""
    from nmke.ledger import Ledger

    events = Ledger(folder / "ledger.sqlite").events()
    masks = [m for event in events for m in event.body.get("masks", {}).values()]
    shares: dict[str, float | None] = {}
    for name, counted in (("neurons_kept", "kept"), ("neurons_kept_per_edit", "kept_per_edit")):
        found = [m[counted] / m["d_mlp"] for m in masks if counted in m]
        shares[name] = sum(found) / len(found) if found else None
    return shares


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--limit", type=int, default=50)
    parser.add_argument("--only", nargs="*", default=list(RUNS))
    parser.add_argument("--keep", action="store_true", help="keep the record's other methods")
    asked = parser.parse_args()
    facts = data_path("counterfact_full500.jsonl")
    if facts is None:
        sys.exit("counterfact_full500.jsonl not found; point NMKE_DATA at a folder that holds it")
    written = RESULTS / "speed_quality.json"
    cells = (
        json.loads(written.read_text(encoding="utf-8"))["cells"] if written.exists() and asked.keep else {}
    )
    for name in asked.only:
        with tempfile.TemporaryDirectory() as folder:
            cells[name] = {**run(facts, asked.limit, RUNS[name], Path(folder) / "run"), "machine": machine()}
        scores = cells[name]["scores"]["teacher_forced"]
        print(
            f"{name:34s} Rel {scores['reliability']:.3f} Gen {scores['generalization']:.3f} "
            f"Loc {scores['locality']:.3f}  {cells[name]['seconds_per_edit']:.2f} s/edit  "
            f"{cells[name]['peak_rss_mb']:.0f} MB  kept {cells[name]['neurons_kept']}",
            flush=True,
        )
        setup = {
            "model": "smollm2-135m",
            "facts": "counterfact_full500, first records",
            "edits": asked.limit,
            "batch_size": 10,
            "layers": "each method's own: 16-20 for nmke, 4-8 for the others",
            "steps": 25,
            "protocol": "teacher_forced, after the last edit; true paraphrases",
        }
        write_record("speed_quality", {"setup": setup, "cells": cells})
    print(RESULTS / "speed_quality.json")


if __name__ == "__main__":
    main()
