"""What each kind of job does. Every one can be done again after a restart: the ledger says how far it came."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from nmke.cli.probes import Answer, Probe, answers, probes_json
from nmke.events import Event
from nmke.ledger import Ledger
from nmke.models.cache import atomic_file
from nmke.session import BatchReport
from nmke.studio.jobs import Job, JobProgress, Paused
from nmke.types import EditRequest, Neighbor

if TYPE_CHECKING:
    from nmke.studio.service import Studio

MOST_PROBES = 24


def perform(studio: Studio, job: Job) -> dict[str, Any]:
    """Do a job and say what came of it."""
    _take_note(studio, job)  # of what it wrote before the process was killed
    with studio.reading() as ledger:
        job.seq_before = ledger.last_seq()
    studio.worker.store.save(job)
    try:
        if studio.session.pending_replay() is not None:
            with studio.gate.turn(patient=True):  # an interrupted revert is finished before anything else
                list(studio.session.edit_many([], progress=JobProgress(job)))
        return _KINDS[job.kind](studio, job)
    finally:
        _take_note(studio, job)
        job.seq_before = None


def request_json(request: EditRequest) -> dict[str, Any]:
    """A request as a job keeps it."""
    return asdict(request)


def _requests(job: Job) -> list[EditRequest]:
    found = []
    for item in job.payload["requests"]:
        neighbors = tuple(Neighbor(**neighbor) for neighbor in item["neighborhood"])
        found.append(
            EditRequest(**{**item, "paraphrases": tuple(item["paraphrases"]), "neighborhood": neighbors})
        )
    return found


def _edit(studio: Studio, job: Job) -> dict[str, Any]:
    session, requests = studio.session, _requests(job)
    probes = _probes(requests) if job.payload["watch"] else []
    before = _asked_before(studio, job, probes)
    progress = JobProgress(job)
    todo, skipped = _still_to_do(studio, job, requests)
    with session.using(**job.payload["settings"]) as config, progress.task("facts", len(requests)) as task:
        task.advance(len(requests) - len(todo), f"in batches of {config.batch_size}")
        batches = session.edit_many(todo, progress=progress, stop=lambda: job.wish == "pause")
        while (report := _next(studio, batches)) is not None:
            job.result = _summary(_own_events(studio, job), len(requests), skipped)
            task.advance(len(report.records))
    result = _summary(_own_events(studio, job), len(requests), skipped)
    if result["left"]:
        job.result = result
        raise Paused
    with studio.gate.turn(patient=True):
        after = answers(session.model, probes)
    return {**result, "probes": probes_json(probes, before, after)}


def _still_to_do(studio: Studio, job: Job, requests: Sequence[EditRequest]) -> tuple[list[EditRequest], int]:
    """The requests that the job has not dealt with, and how many of them the run holds from elsewhere."""
    done = {record.request.id for event in _own_events(studio, job) for record in event.edits}
    left = [request for request in requests if request.id not in done]
    if not job.payload["resume"]:
        return left, 0
    with studio.reading() as ledger:
        todo = [request for request in left if request.id not in ledger.edits]
    return todo, len(left) - len(todo)


def _next(studio: Studio, batches: Any) -> BatchReport | None:
    """The next batch, in its turn at the model: between two batches others have theirs."""
    with studio.gate.turn(patient=True):
        return next(batches, None)


def _probes(requests: Sequence[EditRequest]) -> list[Probe]:
    """The prompts to ask before and after: everything about one fact, the edits themselves of several."""
    probes: list[Probe] = []
    for request in requests:
        probes.append(Probe("edit", request.id, request.text, request.target_new))
        if len(requests) == 1:
            paraphrases, neighbors = request.paraphrases, request.neighborhood
            probes += [Probe("paraphrase", request.id, text, request.target_new) for text in paraphrases]
            probes += [Probe("neighbour", request.id, n.prompt, request.target_new) for n in neighbors]
    return probes[:MOST_PROBES]


def _asked_before(studio: Studio, job: Job, probes: list[Probe]) -> list[Answer]:
    """What the model said before the job's first batch; kept, because a restart cannot ask it again."""
    path = studio.worker.store.folder / job.id / "before.json"
    if path.is_file():
        return [Answer(**item) for item in json.loads(path.read_text(encoding="utf-8"))]
    with studio.gate.turn(patient=True):
        found = answers(studio.session.model, probes)
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps([asdict(answer) for answer in found]), encoding="utf-8")
    return found


def _undo(studio: Studio, job: Job) -> dict[str, Any]:
    own = _own_events(studio, job)
    with studio.gate.turn(patient=True):
        event = own[-1] if own else studio.session.undo(job.payload["n"])
    with studio.reading() as ledger:
        edits = [record.request.id for seq in event.body["undone"] for record in ledger.event(seq).edits]
    return {"undone": edits, "content_hash": event.hash_after}


def _revert(studio: Studio, job: Job) -> dict[str, Any]:
    if not _own_events(
        studio, job
    ):  # else it was taken back before a restart, and the rest is edited again by now
        with studio.gate.turn(patient=True):
            studio.session.revert(job.payload["id"], progress=JobProgress(job))
    events = _own_events(studio, job)
    again = [event for event in events if event.kind == "edit"]
    result = _summary(again, sum(len(event.edits) for event in again))
    return {**result, "reverted": job.payload["id"], "content_hash": events[-1].hash_after}


def _retry(studio: Studio, job: Job) -> dict[str, Any]:
    if not _own_events(studio, job):
        with studio.gate.turn(patient=True):
            studio.session.retry(job.payload["ids"], progress=JobProgress(job), **job.payload["settings"])
    events = _own_events(studio, job)
    return _summary(events, len(job.payload["ids"]))


def _prepare(studio: Studio, job: Job) -> dict[str, Any]:
    from nmke.preparing import lacking, prepare_session

    session = studio.session
    with session.using(**job.payload["settings"]) as config, studio.gate.turn(patient=True):
        found = prepare_session(session, JobProgress(job))
    return {"layers": list(config.layers or ()), "gathered": lacking(found)}


def _export(studio: Studio, job: Job) -> dict[str, Any]:
    from nmke.cli.export import agreement

    form, name = job.payload["format"], job.payload["name"]
    target = studio.export_path(form, name)
    target.parent.mkdir(exist_ok=True)
    progress = JobProgress(job)
    with studio.gate.turn(patient=True), progress.task(f"writing and checking {name}", 1) as task:
        report = studio.session.export(form, target, force=True)
        task.running.done = 1
    return {
        "format": form,
        "path": str(target.relative_to(studio.root)),
        "bytes": report.bytes,
        "content_hash": report.content_hash,
        "checked": agreement(report),
        "load": report.load,
        "notes": list(report.notes),
    }


_KINDS: dict[str, Callable[[Studio, Job], dict[str, Any]]] = {
    "edit": _edit,
    "undo": _undo,
    "revert": _revert,
    "retry": _retry,
    "prepare": _prepare,
    "export": _export,
}


def _own_events(studio: Studio, job: Job) -> list[Event]:
    """What the job wrote so far."""
    with studio.reading() as ledger:
        return [ledger.event(seq) for seq in (*job.own, *_fresh(ledger, job))]


def _take_note(studio: Studio, job: Job) -> None:
    """Enter what the job wrote since it was last begun among its own."""
    with studio.reading() as ledger:
        job.own += _fresh(ledger, job)


def _fresh(ledger: Ledger, job: Job) -> list[int]:
    """Events since the job was last begun: nobody else writes meanwhile, but after a kill somebody may have."""
    if job.seq_before is None:
        return []
    names = {item["id"] for item in job.payload.get("requests", ())}
    found = []
    for seq in range(job.seq_before + 1, ledger.last_seq() + 1):
        event = ledger.event(seq)
        if seq not in job.own and (not names or names >= {record.request.id for record in event.edits}):
            found.append(seq)
    return found


def _summary(events: Sequence[Event], facts: int, skipped: int = 0) -> dict[str, Any]:
    """Counts, and one entry per fact that was dealt with, the newest hundred."""
    records = [record for event in events for record in event.edits]
    last = events[-1] if events else None
    return {
        "facts": facts,
        "skipped": skipped,
        "left": facts - skipped - len(records),
        **{status: sum(r.status == status for r in records) for status in ("written", "failed", "known")},
        "edits": [
            {
                "id": record.request.id,
                "status": record.status,
                "prompt": record.request.text,
                "target_new": record.request.target_new,
                "detail": record.detail,
            }
            for record in records[-100:]
        ],
        "batches": [event.id for event in events],
        "masks": last.body.get("masks", {}) if last else {},
        "drift": last.body.get("drift", {}) if last else {},
        "health": last.body.get("health") if last else None,
        "content_hash": last.hash_after if last else None,
    }
