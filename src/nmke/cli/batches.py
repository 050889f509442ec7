"""The loop behind `nmke edit`: prepare, ask, edit batch by batch, ask again, score; Ctrl-C ends it cleanly."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import TYPE_CHECKING

from nmke.cli.checkpoints import Checkpoints
from nmke.cli.console import Display, is_lively, note, progress
from nmke.cli.probes import Answer, Probe, answers, choose_probes
from nmke.cli.scoring import base_outputs, score_session
from nmke.errors import HealthError
from nmke.progress import quiet

if TYPE_CHECKING:
    from nmke.evaluation.score_table import ScoreTable
    from nmke.events import EditRecord
    from nmke.session import BatchReport, EditSession
    from nmke.types import EditCase, EditRequest


@dataclass
class Outcome:
    """What one command edited.

    Args:
        reports: One per batch.
        probes, before, after: The prompts shown, and what the model said.
        scores: Scores over all facts of the command after the last edit; None when not asked for.
        skipped: Facts that the run held already.
        interrupted: Whether Ctrl-C ended it early.
        prepare_seconds: Time that statistics took.
        collapsed: The health limit that ended it early, None when none did.
        checkpoints: What was measured every so many edits.
    """

    reports: list[BatchReport] = field(default_factory=list)
    probes: list[Probe] = field(default_factory=list)
    before: list[Answer] = field(default_factory=list)
    after: list[Answer] = field(default_factory=list)
    scores: ScoreTable | None = None
    skipped: int = 0
    interrupted: bool = False
    prepare_seconds: float = 0.0
    collapsed: HealthError | None = None
    checkpoints: Checkpoints = field(default_factory=Checkpoints)

    @property
    def records(self) -> list[EditRecord]:
        """One per fact, in order."""
        return [record for report in self.reports for record in report.records]

    @property
    def n_edits(self) -> int:
        """Facts that this command dealt with."""
        return len(self.records)

    def with_status(self, status: str) -> list[EditRecord]:
        """The records with that status: "written", "failed" or "known"."""
        return [record for record in self.records if record.status == status]

    @property
    def seconds(self) -> dict[str, float]:
        """Time by stage, over all batches."""
        total: dict[str, float] = {}
        for report in self.reports:
            for stage, seconds in report.seconds.items():
                total[stage] = total.get(stage, 0.0) + seconds
        return total

    @property
    def seconds_per_edit(self) -> float | None:
        """Time of the edit stages over the facts that were edited; known ones cost nothing."""
        edited = self.n_edits - len(self.with_status("known"))
        return sum(self.seconds.values()) / edited if edited else None


def edit_all(
    session: EditSession,
    requests: Sequence[EditRequest],
    *,
    resume: bool = False,
    evaluate: bool = True,
    checkpoints: Checkpoints | None = None,
) -> Outcome:
    """Edit the facts in batches, with progress on stderr.

    A health limit crossed in a later batch ends the loop and is kept in the outcome, so that what was done is shown.

    Raises:
        NmkeError: As `EditSession.edit_many`.
    """
    known = session.ledger.known_ids(session.ledger.active())
    new = [request for request in requests if request.id not in known] if resume else list(requests)
    outcome = Outcome(skipped=len(requests) - len(new), checkpoints=checkpoints or Checkpoints())
    if outcome.skipped:
        note(f"{outcome.skipped} of {len(requests)} facts are in the run already and are skipped")
    shown = progress()
    outcome.prepare_seconds = _prepare(session, shown)
    if evaluate:
        base_outputs(session, requests)
        outcome.probes = choose_probes(new or requests)
        outcome.before = answers(session.model, outcome.probes)
    _edit_batches(session, new, outcome, shown, resume=resume)
    if evaluate and not outcome.interrupted:
        outcome.after = answers(session.model, outcome.probes)
        outcome.scores = score_session(session, _cases(requests))
    return outcome


def _cases(requests: Sequence[EditRequest]) -> list[EditCase]:
    """Each fact as a case of its own; of several edits of one fact the last."""
    from nmke.types import EditCase

    last = {request.fact_key: request for request in requests}
    return [EditCase((request,)) for request in requests if last[request.fact_key] is request]


def _prepare(session: EditSession, shown: Display) -> float:
    """Gather the statistics that the session's settings need and say so; the seconds it took."""
    from nmke.preparing import needed, prepare_session

    config, begun = session.config, time.perf_counter()
    for one in needed(session.model, config, session.store):
        if one.missing:
            note(
                f"{one.name} of layers {', '.join(map(str, one.missing))} are not cached: gathering them "
                f"(once; corpus {config.corpus!r}, {config.corpus_tokens} tokens)"
            )
    prepare_session(session, shown)
    return time.perf_counter() - begun


def _edit_batches(
    session: EditSession,
    requests: Sequence[EditRequest],
    outcome: Outcome,
    shown: Display,
    *,
    resume: bool,
) -> None:
    total = -(-len(requests) // session.config.batch_size)
    outer = shown if is_lively() else quiet  # plain lines have one line per batch anyway
    with _interrupts() as stop, outer.task("batches", total=total) as task:
        try:
            for report in session.edit_many(requests, resume=resume, stop=stop, progress=shown):
                outcome.reports.append(report)
                task.advance()
                shown.line(_batch_line(report, len(outcome.reports), total))
                outcome.checkpoints.after(session, report, shown)
        except HealthError as error:
            outcome.reports += _collapsed_batch(session, outcome)
            if not outcome.reports:
                raise
            outcome.collapsed = error
        outcome.interrupted = stop() and len(outcome.records) < len(requests)


def _collapsed_batch(session: EditSession, outcome: Outcome) -> list[BatchReport]:
    """The batch that crossed a limit, unless it was taken back."""
    from nmke.session import BatchReport

    last = session.ledger.last()
    if last is None or last.kind != "edit" or last.seq in {r.event.seq for r in outcome.reports}:
        return []
    event = session.ledger.event(last.seq)
    return [BatchReport(event, event.body.get("seconds", {}))]


def _batch_line(report: BatchReport, number: int, total: int) -> str:
    """One line on a batch."""
    counts = {s: sum(r.status == s for r in report.records) for s in ("written", "failed", "known")}
    said = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
    drift = max(report.event.body.get("drift", {}).values(), default=0.0)
    took = sum(report.seconds.values())
    return (
        f"batch {number}/{total}  {report.event.id}  {said}  {took:.1f} s  drift {drift:.2%}"
        f"{_health_words(report)}  hash {report.event.hash_after[:12]}"
    )


def _health_words(report: BatchReport) -> str:
    health = report.health
    if health is None:
        return ""
    retention = "" if health.retention is None else f"  retention {health.retention:.2f}"
    return f"  KL {health.kl:.3f}{retention}"


class _Stop:
    """Asked between batches; set by the first Ctrl-C."""

    def __init__(self) -> None:
        self.asked = False

    def __call__(self) -> bool:
        return self.asked

    def handle(self, _signal: int, _frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        note("finishing this batch, then saving; Ctrl-C again stops at once", "yellow")


@contextmanager
def _interrupts() -> Iterator[_Stop]:
    """The first Ctrl-C inside ends the loop after its batch, the second raises KeyboardInterrupt."""
    stop = _Stop()
    try:
        before = signal.signal(signal.SIGINT, stop.handle)
    except ValueError:  # not the main thread
        yield stop
        return
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)
