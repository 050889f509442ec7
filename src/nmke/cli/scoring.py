"""Scores for the command line: base outputs kept in the run folder, tables out of `ScoreTable`s."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nmke.cli.console import fact, make_table, stdout, working

if TYPE_CHECKING:
    from nmke.evaluation.base_outputs import BaseOutputs
    from nmke.evaluation.score_table import ProtocolScores, ScoreTable
    from nmke.session import EditSession
    from nmke.types import EditRequest

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
    session: EditSession, requests: Sequence[EditRequest], protocols: Sequence[str] = ("teacher_forced",)
) -> ScoreTable:
    """Scores of the session's model as it is now; a record of them stays in the run folder."""
    from nmke.evaluation.protocols import score
    from nmke.evaluation.score_records import save_scores

    base = base_outputs(session, requests)
    with working(f"scoring {len(requests)} facts ({', '.join(protocols)})"):
        table = score(session.model, requests, base, protocols)
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
