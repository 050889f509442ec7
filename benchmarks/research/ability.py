"""What a stream of edits costs elsewhere: general ability of kept runs, before and after, question by question.

The runs are those that `streams.py` left under build/research/streams, opened as they stand at their end. Every task asks
the same questions of all (drawn by seed 0): the change against the unedited model, and `nmke` minus the other, each with
its paired 95 % interval.

    python benchmarks/research/ability.py "nmke" "alphaedit" [--model gemma3-270m] [--data zsre] [--limit 400]
        [--tasks lambada arc_easy ...]
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import Any

from streams import FOLDER, METHODS, REFERENCE, add_setup, edited_so_far, run_label

from nmke.evaluation.ability import AbilityScores, ability_tasks
from nmke.evaluation.metrics import paired_difference
from nmke.evaluation.tasks import compare
from nmke.session import EditSession
from record import RESULTS, write_record

TASKS = ("lambada", "arc_easy", "piqa", "winogrande")
Json = dict[str, Any]


def measured(name: str, asked: argparse.Namespace) -> tuple[Json, dict[str, AbilityScores]]:
    """Every task on one run: what goes into the record, and the scores it was made from."""
    cell: Json = {"tasks": {}}
    scores: dict[str, AbilityScores] = {}
    with EditSession.open(FOLDER / run_label(name, asked)) as session:
        cell |= {"edits": edited_so_far(session), "content_hash": session.content_hash}
        for task in asked.tasks:
            found = compare(session, task, limit=asked.limit)
            assert found.before is not None
            scores[task] = found.after
            metric = main_metric(found.after)
            cell["tasks"][task] = {
                "metric": metric,
                "before": asdict(found.before.metrics[metric]),
                "after": asdict(found.after.metrics[metric]),
                "change": asdict(found.change[metric]),
            }
            mean = found.change[metric].mean
            print(f"{name}: {task} {metric} {found.after.metrics[metric].mean:.3f} ({mean:+.3f})", flush=True)
    return cell, scores


def main_metric(scores: AbilityScores) -> str:
    """The one that a task names first."""
    return next(iter(scores.metrics))


def main() -> None:
    """Measure the runs asked for; cells of other streams stay in the record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="+", choices=METHODS, metavar="NAME", help=", ".join(METHODS))
    add_setup(parser)
    parser.add_argument("--limit", type=int, default=400, help="questions of each task")
    parser.add_argument("--tasks", nargs="+", choices=ability_tasks.names(), default=TASKS)
    asked = parser.parse_args()
    path = RESULTS / "research_ability.json"
    streams: Json = json.loads(path.read_text("utf-8"))["streams"] if path.is_file() else {}
    cells = streams.setdefault(f"{asked.model}, {asked.data}, batches of {asked.batch}", {})
    known: dict[str, dict[str, AbilityScores]] = {}
    for name in asked.names:
        cells[name], known[name] = measured(name, asked)
        for task, scores in known[name].items() if name != REFERENCE and REFERENCE in known else ():
            metric = main_metric(scores)
            both = (known[REFERENCE][task].values[metric], scores.values[metric])
            cells[name]["tasks"][task]["reference_minus_this"] = asdict(paired_difference(*both))
        print(write_record("research_ability", {"setup": {"questions": asked.limit}, "streams": streams}))


if __name__ == "__main__":
    main()
