"""A checkpoint: everything that is measured on a cell's model after some edits."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence

from nmke.bench.cell_run import CellRun
from nmke.bench.held_out import HeldOutText
from nmke.bench.record import Checkpoint, Cost, TaskScore
from nmke.bench.scores import BatchNotes, protocol_records
from nmke.evaluation.tasks import compare
from nmke.events import Event


def measure(run: CellRun, held_out: HeldOutText) -> Checkpoint:
    """The model as it is now, after `run.done` batches.

    Args:
        run: The cell; all its batches so far have notes.
        held_out: Text for perplexity and KL.
    """
    asked = [request for batch in run.batches[: run.done] for request in batch]
    notes, events = run.notes(), run.events()
    protocols = run.cell.plan.protocols
    rows_now = (
        notes[0].rows if len(notes) == 1 else run.score(asked)
    )  # one batch was scored just as it stands
    statuses = Counter(record.status for event in events for record in event.edits)
    return Checkpoint(
        n_edits=len(asked),
        n_written=statuses["written"],
        n_known=statuses["known"],
        n_failed=statuses["failed"],
        after_batch=protocol_records([row for note in notes for row in note.rows], protocols),
        after_last=protocol_records(rows_now, protocols),
        held_out=held_out.measure(run.session.base),
        tasks={name: _ability(run, name) for name in run.cell.plan.tasks},
        drift=run.session.weights.drift(),
        neurons_kept=neurons_kept(events),
        cost=cost(run, events, notes),
        content_hash=run.session.content_hash,
    )


def _ability(run: CellRun, task: str) -> TaskScore:
    """One task on the edited and the unedited model, by the metric that tells most."""
    found = compare(run.session, task, limit=run.cell.plan.task_limit)
    metric, score = next(iter(found.after.metrics.items()))
    change = found.change.get(metric)
    return TaskScore(
        metric=metric,
        value=score.mean,
        low=score.low,
        high=score.high,
        n=score.n,
        version=found.after.version,
        base=None if found.before is None else found.before.metrics[metric].mean,
        change=None if change is None else (change.mean, change.low, change.high),
    )


def neurons_kept(events: Sequence[Event]) -> float | None:
    """Mean share of neurons that an edit of these batches may write, over layers; None without masks."""
    masks = [mask for event in events for mask in event.body.get("masks", {}).values()]
    shares = [mask.get("kept_per_edit", mask["kept"]) / mask["d_mlp"] for mask in masks]
    return statistics.fmean(shares) if shares else None


def cost(run: CellRun, events: Sequence[Event], notes: Sequence[BatchNotes]) -> Cost:
    """What the edits took: stages as the ledger has them, CPU time as noted for batches that were timed."""
    stages: Counter[str] = Counter()
    edited = timed = 0
    cpu = 0.0
    for event, note in zip(events, notes, strict=bool(events)):  # the unedited model has no events
        stages.update(event.body.get("seconds", {}))
        fresh = sum(record.status != "known" for record in event.edits)
        edited += fresh
        if note.cpu_seconds is not None:
            timed, cpu = timed + fresh, cpu + note.cpu_seconds
    loads = [note.load for note in notes]
    return Cost(
        seconds_per_edit=stages.total() / edited if edited else None,
        cpu_seconds_per_edit=cpu / timed if timed else None,
        stages=dict(stages),
        load_average=(min(loads), max(loads)),
        peak_memory_mb=max(note.peak_memory_mb for note in notes),
        memory_of=run.peak.of,
    )
