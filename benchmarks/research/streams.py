"""Long streams: which method still holds its first facts after a thousand edits, and what does the model pay?

One cell is one method on one stream of facts: edited batch after batch, and scored at the checkpoints on 100 facts (or
--score) spread evenly over all that were edited so far (teacher-forced, two paraphrases and three neighbours each), with
the perplexity of WikiText-2 test. A stream that stands at its end is scored again when more facts are asked for.
Cells are compared on the facts that both have: paired 95 % intervals of reliability, generalization, locality and their
mean, against `nmke`, or its first version where that is all there is. Paraphrases of CounterFact are the derived ones.
Methods of one call share the targets that they seek on the unedited model for the first batch.
Runs and scores are kept under build/research/streams, so that an interrupted stream goes on where it stopped; the record
holds every cell that reached a checkpoint, those of earlier calls among them.

    python benchmarks/research/streams.py "nmke" "nmke, no mask" [--data zsre] [--edits 1000] [--batch 100] [--score 100]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from common import COUNTERFACT, KEPT, METRICS, facts

from nmke.config import EditConfig
from nmke.editors.known_targets import KnownTargets
from nmke.evaluation.base_outputs import collect_base
from nmke.evaluation.held_out import read_articles, wikitext_path
from nmke.evaluation.metrics import mean_interval, paired_difference
from nmke.evaluation.perplexity import perplexity
from nmke.evaluation.protocols import score
from nmke.models.load import EditableModel
from nmke.session import EditSession
from nmke.types import EditRequest
from record import RESULTS, commit, write_record

DATA = {  # where to begin, and where to go on at the end of the file: records that no setting was tuned on
    "counterfact": (COUNTERFACT, (17_000, 15_300)),
    "zsre": ("zsre.jsonl", (2_000,)),
}
METHODS: dict[str, dict[str, Any]] = {
    "nmke": {},
    "nmke, random neurons": {"mask": "random"},
    "nmke, no mask": {"mask": "none"},
    "nmke-linear": {"method": "nmke-linear"},
    "nmke-linear, random masks": {"method": "nmke-linear", "mask": "random"},
    "alphaedit": {"method": "alphaedit"},
    "alphaedit, lambda 1": {"method": "alphaedit", "l2": 1.0},
    "alphaedit, lambda 100": {"method": "alphaedit", "l2": 100.0},
}
CHECKPOINTS = (100, 300, 500, 1_000, 2_000)
NEIGHBOURS, HELD_OUT_TOKENS = 3, 4_096
REFERENCE = "nmke"
# Until commit fa0eb1c: one round of targets, subjects of earlier edits forgotten.
FIRST = "nmke, first version"
REFERENCES = {f"{FIRST}, random neurons": (FIRST,)}  # others: against what is there, the newer version first
FOLDER = KEPT / "streams"
Json = dict[str, Any]


def stream(name: str, asked: argparse.Namespace, known: KnownTargets) -> None:
    """Edit what is left of one cell, and score it at every checkpoint."""
    file, starts = DATA[asked.data]
    found: dict[str, EditRequest] = {}
    for request in (one for first in starts for one in facts(first, asked.edits, file, NEIGHBOURS)):
        found.setdefault(request.fact_key, request)
    requests = list(found.values())[: asked.edits]
    label = run_label(name, asked)
    config = EditConfig.create(
        **METHODS[name], batch_size=asked.batch, seed=asked.seed, on_collapse="continue", health_every=0
    )
    path = FOLDER / f"{label}.json"
    FOLDER.mkdir(parents=True, exist_ok=True)
    cell: Json = json.loads(path.read_text("utf-8")) if path.is_file() else {"points": {}}
    with EditSession.open(asked.model, FOLDER / label, config=config) as session:
        session.share_targets(known)
        cell |= {
            "setup": {key: getattr(asked, key) for key in ("model", "data", "batch", "seed")},
            "name": name, "commit": commit(), "settings": session.config.model_dump(mode="json"),
        }  # fmt: skip
        if "0" not in cell["points"]:
            with session.base():
                cell["points"]["0"] = {"perplexity": held_out_perplexity(session.model)}
        for _ in session.edit_many(requests, resume=True):
            if edited_so_far(session) in (*CHECKPOINTS, len(requests)):
                keep_point(path, cell, session, requests, asked.score)
        scored = len(cell["points"].get(str(len(requests)), {}).get("rows", ()))
        if edited_so_far(session) == len(requests) and scored < min(asked.score, len(requests)):
            keep_point(path, cell, session, requests, asked.score)


def add_setup(parser: argparse.ArgumentParser) -> None:
    """The options that tell one stream from another, and with a method's name one run from another."""
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--data", choices=DATA, default="counterfact")
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)


def run_label(name: str, asked: argparse.Namespace) -> str:
    """Name of a cell's run and of its scores."""
    return (
        f"{asked.model}_{asked.data}_{asked.batch}_{asked.seed}_{name.replace(', ', '_').replace(' ', '-')}"
    )


def edited_so_far(session: EditSession) -> int:
    """How many facts of the stream were edited, those that were known before included."""
    return len(session.ledger.known_ids(session.ledger.active()))


def keep_point(
    path: Path, cell: Json, session: EditSession, requests: Sequence[EditRequest], count: int
) -> None:
    """Score the model as it is, and keep that."""
    done = edited_so_far(session)
    cell["points"][str(done)] = point(session, requests[:done], count)
    path.write_text(json.dumps(cell), encoding="utf-8")
    show(cell["name"], done, cell["points"][str(done)])


def point(session: EditSession, edited: Sequence[EditRequest], count: int) -> Json:
    """Scores of the model as it is, on `count` of the facts."""
    some = edited[:: max(1, len(edited) // count)][:count]
    with session.base():
        base = collect_base(session.model, some)
    rows = {row["id"]: row["teacher_forced"] for row in score(session.model, some, base).rows_to_json()}
    return {"perplexity": held_out_perplexity(session.model), "rows": rows}


def held_out_perplexity(model: EditableModel) -> float:
    """Perplexity of WikiText-2 test."""
    path = wikitext_path()
    assert path is not None, "WikiText-2 test not found; point NMKE_DATA at a folder that holds it"
    return perplexity(model, read_articles(path), max_tokens=HELD_OUT_TOKENS)


def values(found: Json, metric: str, wanted: Sequence[str] = ()) -> list[float]:
    """One value per fact, of some facts or of all; "mean" is that of the three metrics."""
    names, rows = (METRICS if metric == "mean" else (metric,)), found["rows"]
    return [sum(rows[fact][n] for n in names) / len(names) for fact in wanted or rows]


def show(name: str, edits: int, found: Json) -> None:
    """One line on a checkpoint."""
    means = " / ".join(f"{mean_interval(values(found, m)).mean:.3f}" for m in (*METRICS, "mean"))
    print(f"{name}: {edits} edits  {means}  perplexity {found['perplexity']:.2f}", flush=True)


def summary(cells: Sequence[Json]) -> Json:
    """Every cell's points as estimates, with paired differences to the reference on the same facts."""
    by_key = {(json.dumps(c["setup"], sort_keys=True), c["name"]): c for c in cells}
    found: Json = {}
    for (setup, name), cell in sorted(by_key.items()):
        points: Json = {}
        for edits, one in cell["points"].items():
            points[edits] = {"perplexity": one["perplexity"]}
            for metric in (*METRICS, "mean") if "rows" in one else ():
                points[edits][metric] = asdict(mean_interval(values(one, metric)))
            for reference in REFERENCES.get(name, (REFERENCE, FIRST)):
                other = by_key.get((setup, reference), {}).get("points", {}).get(edits, {})
                both = [fact for fact in one.get("rows", ()) if fact in other.get("rows", ())]
                if both and name != reference:
                    points[edits] |= {
                        "reference": reference,
                        "reference_minus_this": paired(other, one, both),
                    }
                if both:
                    break
        about = {key: cell[key] for key in ("setup", "commit", "settings")}
        found.setdefault(name, []).append({**about, "points": points})
    return found


def with_earlier(found: Json) -> Json:
    """The cells found now, and those of the committed record that are not among them; points are taken one by one."""
    path = RESULTS / "research_streams.json"
    earlier: Json = json.loads(path.read_text("utf-8"))["cells"] if path.is_file() else {}
    for name, cells in earlier.items():
        here = {json.dumps(cell["setup"], sort_keys=True): cell for cell in found.setdefault(name, [])}
        for cell in cells:
            now = here.get(json.dumps(cell["setup"], sort_keys=True))
            if now is None:
                found[name].append(cell)
            else:
                now["points"] = {**cell["points"], **now["points"]}
    return found


def paired(reference: Json, other: Json, facts_of_both: Sequence[str]) -> Json:
    """The reference minus the other, fact by fact."""
    return {
        metric: asdict(
            paired_difference(*(values(each, metric, facts_of_both) for each in (reference, other)))
        )
        for metric in (*METRICS, "mean")
    }


def main() -> None:
    """Run the cells that were asked for, and write the record of all that are there."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "names", nargs="*", choices=[*METHODS, []], metavar="NAME", help=f"{', '.join(METHODS)}"
    )
    add_setup(parser)
    parser.add_argument("--edits", type=int, default=1_000)
    parser.add_argument("--score", type=int, default=100, help="facts that are scored at a checkpoint")
    asked = parser.parse_args()
    if unknown := set(asked.names) - set(METHODS):
        parser.error(f"{', '.join(sorted(unknown))}: not one of {'; '.join(METHODS)}")
    known = KnownTargets()
    for name in asked.names:
        stream(name, asked, known)
    cells = [json.loads(path.read_text("utf-8")) for path in sorted(FOLDER.glob("*.json"))]
    setup = {
        "protocol": "teacher_forced/1, after the newest edit", "neighbours": NEIGHBOURS,
        "first_records": {name: starts for name, (_, starts) in DATA.items()}, "held_out_tokens": HELD_OUT_TOKENS,
    }  # fmt: skip
    print(write_record("research_streams", {"setup": setup, "cells": with_earlier(summary(cells))}))


if __name__ == "__main__":
    main()
