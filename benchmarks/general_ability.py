"""General ability of the unedited built-in models: what there is to lose, and whether the tasks measure sanely.

Every task of `nmke eval --tasks general`, with a limit of questions drawn by seed 0 and the same for both models.
A task that scores significantly *below* chance would mean a wrong prompt; the record says where each one stands.

    python benchmarks/general_ability.py [--limit 200] [--models NAME ...] [--tasks NAME ...]
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from nmke.evaluation.ability import AbilityScores, ability_tasks
from nmke.evaluation.tasks import WIKITEXT, measure_model
from nmke.models.load import load_model
from record import RESULTS, machine, write_record

MODELS = ("smollm2-135m", "gemma3-270m")
SLOW = {"gsm8k": 8, "wikitext": 4, "bbh": 2}  # so many times fewer questions or windows: they take longest


def cell(scores: AbilityScores) -> dict[str, Any]:
    """One task on one model."""
    content = scores.to_json()
    first = next(iter(scores.metrics.values()))
    if scores.chance is not None:
        above, below = first.low > scores.chance, first.high < scores.chance
        content["against_chance"] = "above" if above else "below" if below else "at chance"
    return {**content, "machine": machine()}


def known_cells() -> dict[str, Any]:
    """What the record holds already; a task measured again replaces its cell."""
    path = RESULTS / "general_ability.json"
    return dict(json.loads(path.read_text(encoding="utf-8"))["cells"]) if path.exists() else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--models", nargs="*", default=list(MODELS))
    parser.add_argument("--tasks", nargs="*", default=[WIKITEXT, *ability_tasks.names()])
    asked = parser.parse_args()
    for name in asked.models:
        model = load_model(name)
        for task in asked.tasks:
            scores = measure_model(model, task, limit=asked.limit // SLOW.get(task, 1)).after
            cells = known_cells()
            cells.setdefault(name, {})[task] = cell(scores)
            setup = {"limit": asked.limit, "seed": 0, "dtype": "float32", "fewer_questions": SLOW}
            write_record("general_ability", {"setup": setup, "cells": cells})
            first = next(iter(scores.metrics.items()))
            print(
                f"{name:14s} {task:14s} {first[0]} {first[1].mean:.3f} n={scores.n} {scores.seconds:.0f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
