"""Scores for the command line: base outputs kept in the run folder, tables out of `ScoreTable`s."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nmke.cli.console import fact, make_table, stdout, working

if TYPE_CHECKING:
    from nmke.evaluation.base_outputs import BaseOutputs
    from nmke.evaluation.metrics import Estimate
    from nmke.evaluation.score_table import ProtocolScores, ScoreTable
    from nmke.evaluation.tasks import Comparison
    from nmke.session import EditSession
    from nmke.types import EditCase, EditRequest

FOLDER = "base-outputs"


def base_outputs(session: EditSession, requests: Sequence[EditRequest]) -> BaseOutputs:
    """What the unedited model says on the neighbours; computed once per list of facts and run."""
    from nmke.evaluation.base_outputs import BaseOutputs, collect_base, facts_hash
    from nmke.models.cache import atomic_file

    path = session.folder.root / FOLDER / f"{facts_hash(requests)[:24]}.json"
    fingerprint = session.model.fingerprint
    if path.is_file():
        found = BaseOutputs.load(path)
        if found.model == fingerprint and found.facts == facts_hash(requests):
            return found
    asked = sum(len(request.neighborhood) for request in requests)
    shown = working(f"asking the unedited model {asked} neighbours") if asked else contextlib.nullcontext()
    with session.base(), shown:
        collected = collect_base(session.model, requests, model_hash=fingerprint)
    with contextlib.suppress(OSError), atomic_file(path) as temporary:  # a run may be read-only
        collected.save(temporary)
    return collected


def score_session(
    session: EditSession,
    cases: Sequence[EditCase],
    protocols: Sequence[str] = ("teacher_forced",),
    *,
    seed: int = 0,
) -> ScoreTable:
    """Scores of the session's model as it is now; a record of them stays in the run folder."""
    from nmke.evaluation.portability import score_cases
    from nmke.evaluation.score_records import save_scores

    requests = [request for case in cases for request in case.final_requests]
    base = base_outputs(session, requests)
    with working(f"scoring {len(cases)} facts ({', '.join(protocols)})"):
        table = score_cases(session.model, cases, base, protocols, seed=seed)
    with contextlib.suppress(OSError):  # a run may be read-only
        save_scores(session.folder.root, session.content_hash, requests, table)
    return table


def print_scores(table: ScoreTable) -> None:
    """One table per protocol: mean, 95 % interval and number of prompts of every metric."""
    for scores in table.protocols.values():
        title = f"{scores.version}, {scores.n} facts"
        if scores.counts.get("requests_left_out"):
            title += f" ({scores.counts['requests_left_out']} left out: no true answer)"
        made = make_table(
            ("metric", "mean", "95 % interval", "prompts"), _rows(scores), right=("mean", "prompts")
        )
        made.title, made.title_justify, made.title_style = title, "left", "bold"
        stdout().print(made)


def print_tasks(found: Mapping[str, Comparison]) -> None:
    """One table over all tasks: before, after, change of the same questions; below it what each task is."""
    rows = [row for compared in found.values() for row in _task_rows(compared)]
    compared = any(c.before is not None for c in found.values())
    numbers = ("before", "after", "change") if compared else ("score",)
    made = make_table(("task", "metric", *numbers), rows, right=numbers)
    made.title, made.title_justify, made.title_style = "general ability, 95 % intervals", "left", "bold"
    stdout().print(made)
    for compared_task in found.values():
        after = compared_task.after
        chance = "" if after.chance is None else f", chance {after.chance:.2f}"
        fact("", f"{after.task}: {after.title}, n = {after.n}{chance}   {after.version}")


def _task_rows(compared: Comparison) -> list[tuple[str, ...]]:
    """One row a metric; each interval stands below its number."""
    before, after, rows = compared.before, compared.after, []
    for metric, estimate in after.metrics.items():
        cells = [_interval(estimate)]
        if before is not None:
            change = compared.change.get(metric)
            then = before.metrics.get(metric)
            cells.insert(0, "-" if then is None else _interval(then))
            cells.append("-" if change is None else _interval(change, "+"))
        first = metric == next(iter(after.metrics))
        rows.append((after.task if first else "", metric, *cells))
    return rows


def _interval(estimate: Estimate, sign: str = "") -> str:
    form = f"{sign}.{3 if abs(estimate.high) < 10 else 2}f"
    return f"{estimate.mean:{form}}\n[{estimate.low:{form}}, {estimate.high:{form}}]"


def score_line(scores: ProtocolScores) -> None:
    """The same on a few lines behind a label."""
    found = {name: estimate for name, estimate in scores.metrics.items() if estimate is not None}
    text = "\n".join(f"{name} {e.mean:.2f} [{e.low:.2f}, {e.high:.2f}] n={e.n}" for name, e in found.items())
    missing = [name for name in scores.metrics if name not in found]
    if missing:
        text += f"\n{' and '.join(missing)} not measured: the facts have no such prompts"
    fact("scores", f"{scores.version}, after the last edit, 95 % intervals\n{text}")


def _rows(scores: ProtocolScores) -> list[tuple[str, ...]]:
    return [
        (name, "-", "no such prompts", "0")
        if estimate is None
        else (
            name,
            f"{estimate.mean:.3f}",
            f"{estimate.low:.3f} to {estimate.high:.3f}",
            str(scores.counts.get(name, estimate.n)),
        )
        for name, estimate in scores.metrics.items()
    ]


def facts_label(facts: Path | None, count: int) -> str:
    """Which facts were scored, in words."""
    return f"{count} facts of {facts}" if facts is not None else f"{count} facts of the run itself"
