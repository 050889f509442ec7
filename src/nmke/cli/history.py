"""`nmke log` and `nmke show`: read a run's record; no model is loaded."""

from __future__ import annotations

import hashlib
from contextlib import closing
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from nmke.cli import options
from nmke.cli.console import fact, print_json, say, table
from nmke.cli.opening import run_folder
from nmke.cli.probes import short
from nmke.errors import RequestError

if TYPE_CHECKING:
    from nmke.events import EditRecord, Event
    from nmke.run_folder import BaseInfo


def log(
    run: options.Run,
    as_json: options.Json = False,
) -> None:
    """List the edits of a run, oldest first, and the content hash of its head."""
    base, events, active = read_history(run)
    head = head_hash(base, events)
    edits = [_edit_json(event, record, event.seq in active) for event in events for record in event.edits]
    if as_json:
        content = {
            "schema": "nmke.log/1",
            "run": run,
            "model": base.source,
            "content_hash": head,
            "n_active": sum(edit["active"] for edit in edits),
            "edits": edits,
            "events": [_event_json(event) for event in events],
        }
        print_json(content)
        return
    rows = [row for event in events for row in _event_rows(event, event.seq in active)]
    if rows:
        table(("batch", "time (UTC)", "edit", "what", "state"), rows)
    written = sum(edit["active"] and edit["status"] == "written" for edit in edits)
    fact("run", f"{run} on {base.name}: {written} facts written, {len(events)} events")
    fact("head", f"content hash {head}")


def show(
    run: options.Run,
    edit_id: options.EditId,
    as_json: options.Json = False,
) -> None:
    """Show one edit: request, result, settings, hashes."""
    _, events, active = read_history(run)
    event, record = find_edit(events, edit_id)
    if as_json:
        found = _edit_json(event, record, event.seq in active)
        print_json(
            {
                "schema": "nmke.show/1",
                "run": run,
                **found,
                "request": asdict(record.request),
                "event": _event_json(event),
            }
        )
        return
    request = record.request
    fact("edit", f"{request.id} in batch {event.id} of {event.created}")
    fact("prompt", request.text)
    fact("subject", request.subject)
    fact("answer", f"{request.target_true or '(not given)'} → {request.target_new}")
    fact("state", _state(record, event.seq in active))
    for name, value in record.detail.items():
        fact("", f"{name} = {value:.4g}" if isinstance(value, float) else f"{name} = {value}")
    for label, prompts in (
        ("asked as", request.paraphrases),
        ("near it", [n.prompt for n in request.neighborhood]),
    ):
        if prompts:
            fact(label, "\n".join(prompts))
    config = event.body.get("config", {})
    if config:
        chosen = ", ".join(f"{k}={config[k]}" for k in ("method", "layers", "batch_size", "mask", "steps"))
        fact("settings", chosen)
    fact("hash", f"{event.hash_before[:12]} → {event.hash_after[:12]}")
    say()


def read_history(run: str) -> tuple[BaseInfo, list[Event], set[int]]:
    """Base model, events and the active batches of a run.

    Raises:
        RequestError: If it is no run folder.
        LedgerError: If its record is damaged.
    """
    from nmke.ledger import Ledger
    from nmke.run_folder import RunFolder

    folder = RunFolder(run_folder(run))
    with closing(Ledger(folder.ledger)) as ledger:
        return folder.base, ledger.events(), set(ledger.active())


def head_hash(base: BaseInfo, events: list[Event]) -> str:
    """Content hash of the newest state; of the base itself when nothing was ever edited."""
    return events[-1].hash_after if events else hashlib.sha256(base.fingerprint.encode()).hexdigest()


def find_edit(events: list[Event], edit_id: str) -> tuple[Event, EditRecord]:
    """The newest edit of that id, or of the one id that begins so; taken-back ones are found too.

    Raises:
        RequestError: If none or several fit.
    """
    every = [(event, record) for event in events for record in event.edits]
    ids = {record.request.id for _, record in every}
    fits = {edit_id} if edit_id in ids else {name for name in ids if name.startswith(edit_id)}
    if len(fits) != 1:
        found = ", ".join(sorted(fits)[:5]) or "none"
        raise RequestError(f"edit {edit_id!r} fits {len(fits)} edits ({found}); `nmke log` lists the ids")
    return next(pair for pair in reversed(every) if pair[1].request.id in fits)


def _event_rows(event: Event, active: bool) -> list[tuple[str, ...]]:
    when = event.created.replace("T", " ").removesuffix("+00:00")
    if event.kind != "edit":
        undone = len(event.body.get("undone", []))
        what = f"{undone} batches taken back"
        if "reverted" in event.body:
            what = f"reverted {event.body['reverted']}; {undone} batches taken back, the rest edited again"
        return [(event.id, when, "-", what, event.kind)]
    return [
        (
            event.id,
            when,
            record.request.id,
            f"{short(record.request.text, 60)} → {record.request.target_new}",
            _state(record, active),
        )
        for record in event.edits
    ]


def _state(record: EditRecord, active: bool) -> str:
    return record.status if active else f"{record.status}, undone"


def _edit_json(event: Event, record: EditRecord, active: bool) -> dict[str, Any]:
    request = record.request
    return {
        "id": request.id,
        "batch": event.id,
        "seq": event.seq,
        "created": event.created,
        "status": record.status,
        "active": active,
        "prompt": request.text,
        "subject": request.subject,
        "target_new": request.target_new,
        "detail": record.detail,
    }


def _event_json(event: Event) -> dict[str, Any]:
    return {
        "seq": event.seq,
        "id": event.id,
        "kind": event.kind,
        "created": event.created,
        "hash_before": event.hash_before,
        "hash_after": event.hash_after,
        "edits": [record.request.id for record in event.edits],
        "body": event.body,
    }
