"""Two facts about one subject: does the second edit leave the first one alone?

Pairs of CounterFact records that ask different relations of one subject. All first facts are edited, then all second
ones (batches of 20), and both are scored after the last edit: teacher-forced, derived paraphrases, three neighbours each,
once with targets that hold the answers of earlier edits of the subject and once without; paired 95 % intervals.
The first 40 pairs were looked at while this was built; the record is of those behind them.

    python benchmarks/research/same_subject.py [--first 40] [--pairs 60]
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from common import METRICS, facts

from nmke.config import EditConfig
from nmke.evaluation.base_outputs import collect_base
from nmke.evaluation.metrics import mean_interval, paired_difference
from nmke.evaluation.protocols import score
from nmke.session import EditSession
from nmke.types import EditRequest
from record import write_record

BATCH, NEIGHBOURS, ALL = 20, 3, 20_000
CELLS: dict[str, dict[str, Any]] = {
    "nmke, earlier answers held": {"hold_earlier": True},
    "nmke, not held": {"hold_earlier": False},
    "alphaedit": {"method": "alphaedit"},
}
Json = dict[str, Any]


def pairs(first: int, count: int) -> tuple[list[EditRequest], list[EditRequest]]:
    """The first two facts of each subject that has two of different relations."""
    by_subject: dict[str, dict[str, EditRequest]] = {}
    for request in facts(0, ALL, neighbours=NEIGHBOURS):
        by_subject.setdefault(request.subject_key, {}).setdefault(str(request.relation), request)
    found = [list(each.values())[:2] for each in by_subject.values() if len(each) > 1]
    chosen = list(itertools.islice(found, first, first + count))
    return [one for one, _ in chosen], [replace(two, id=f"{two.id}-second") for _, two in chosen]


def cell(model: str, settings: Json, ones: Sequence[EditRequest], twos: Sequence[EditRequest]) -> Json:
    """Scores of the first and of the second facts after all of them were edited, fact by fact."""
    config = EditConfig.create(batch_size=BATCH, on_collapse="continue", health_every=0, **settings)
    with (
        tempfile.TemporaryDirectory() as folder,
        EditSession.open(model, f"{folder}/run", config=config) as session,
    ):
        base = collect_base(session.model, [*ones, *twos])
        found: Json = {}
        for asked in (ones, twos):
            for _ in session.edit_many(asked):
                pass
        for name, asked in (("first", ones), ("second", twos)):
            rows = {
                row["id"]: row["teacher_forced"] for row in score(session.model, asked, base).rows_to_json()
            }
            found[name] = {metric: [rows[one.id][metric] for one in asked] for metric in METRICS}
    return found


def main() -> None:
    """Run all cells and write the record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--first", type=int, default=40)
    parser.add_argument("--pairs", type=int, default=60)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--cells", nargs="*", default=list(CELLS), choices=CELLS)
    asked = parser.parse_args()
    ones, twos = pairs(asked.first, asked.pairs)
    kept: dict[str, Json] = {}
    cells: Json = {}
    for name in asked.cells:
        kept[name] = found = cell(asked.model, CELLS[name], ones, twos)
        cells[name] = {
            which: {metric: asdict(mean_interval(values)) for metric, values in scores.items()}
            for which, scores in found.items()
        }
        if name != asked.cells[0]:
            reference = kept[asked.cells[0]]
            cells[name]["reference_minus_this"] = {
                which: {m: asdict(paired_difference(reference[which][m], scores[m])) for m in METRICS}
                for which, scores in found.items()
            }
        shown = {w: [round(cells[name][w][m]["mean"], 3) for m in METRICS] for w in found}
        print(f"{name:30s} {shown}", flush=True)
    setup = {
        "model": asked.model, "first_pair": asked.first, "pairs": len(ones), "batch": BATCH, "neighbours": NEIGHBOURS,
        "protocol": "teacher_forced/1, after the newest edit, derived paraphrases",
    }  # fmt: skip
    print(write_record("research_same_subject", {"setup": setup, "cells": cells}))


if __name__ == "__main__":
    main()
