"""Scores right after each batch: what an edit was worth when it was made, before later edits wore it down."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from typing import TYPE_CHECKING

from nmke.errors import RequestError
from nmke.evaluation.base_outputs import BaseOutputs
from nmke.evaluation.portability import score_cases
from nmke.evaluation.protocols import table_of
from nmke.evaluation.score_table import RequestScores, ScoreTable
from nmke.progress import Progress, quiet
from nmke.types import EditCase

if TYPE_CHECKING:
    from nmke.session import EditSession


def score_at_edit(
    session: EditSession,
    cases: Sequence[EditCase],
    base: BaseOutputs | None,
    protocols: Sequence[str],
    *,
    progress: Progress = quiet,
    seed: int = 0,
) -> ScoreTable:
    """Every case scored with the model as it was right after the batch that wrote the case's last fact.

    The run is walked back in memory, batch by batch; its files stay as they are.

    Args:
        session: An open run.
        cases: Those that the run does not hold are left out.
        base: Outputs of the unedited model, for locality.
        protocols: Names out of `PROTOCOLS`.
        progress: Told about each batch.
        seed: Of the bootstrap intervals.

    Raises:
        RequestError: If the run holds none of the cases.
    """
    last = {case.final_requests[-1].id: case for case in cases}
    found: dict[str, list[RequestScores]] = {}
    with (
        closing(session.walk_back()) as states,
        progress.task("scoring each batch", total=len(session.ledger.active())) as task,
    ):
        for event in states:
            ids = dict.fromkeys(record.request.id for record in event.edits)
            there = [last[name] for name in ids if name in last and last[name].id not in found]
            if there:
                for row in score_cases(session.model, there, base, protocols, seed=seed).rows:
                    owner = next(c.id for c in there if row.id in {r.id for r in c.final_requests})
                    found.setdefault(owner, []).append(row)
            task.advance()
    if not found:
        raise RequestError(
            f"none of the {len(cases)} facts is in the run, so there is no batch to score them after; "
            "leave out --when, or name the facts that were edited"
        )
    return table_of([row for case in cases for row in found.get(case.id, ())], protocols, seed=seed)
