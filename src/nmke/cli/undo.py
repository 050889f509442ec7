"""`nmke undo` and `nmke revert`: take edits back, bit for bit."""

from __future__ import annotations

import sys
from contextlib import closing
from typing import Annotated

import typer

from nmke.cli import options
from nmke.cli.console import fact, print_json, progress
from nmke.cli.opening import open_run, run_folder
from nmke.errors import ConfigError


def undo(
    run: options.Run,
    n: Annotated[int, typer.Option("-n", "--batches", min=1, help="How many batches, newest first.")] = 1,
    as_json: options.Json = False,
    device: options.Device = "auto",
) -> None:
    """Take back the last batches, bit for bit; the record keeps them."""
    with closing(open_run(run_folder(run), device)) as session:
        taken = session.ledger.active()[-n:]
        edits = [record.request for seq in taken for record in session.ledger.event(seq).edits]
        event = session.undo(n)
        left = len(session.active_requests())
    if as_json:
        content = {
            "schema": "nmke.undo/1",
            "run": run,
            "undone": [request.id for request in edits],
            "n_active": left,
            "hash_before": event.hash_before,
            "content_hash": event.hash_after,
        }
        print_json(content)
        return
    for request in edits:
        fact("undone", f"{request.id}  {request.text} → {request.target_new}")
    fact("head", f"content hash {event.hash_before[:12]} → {event.hash_after[:12]}, {left} facts left")


def revert(
    run: options.Run,
    edit_id: options.EditId,
    yes: options.Yes = False,
    as_json: options.Json = False,
    device: options.Device = "auto",
) -> None:
    """Take back one edit wherever it stands: restore to before it, then edit what came with it or later again."""
    with closing(open_run(run_folder(run), device)) as session:
        _, request = session.find(edit_id)
        cost = session.revert_cost(edit_id)
        price = f"{cost['edits']:g} other edits are written again, about {cost['seconds']:.0f} s"
        if cost["edits"] and not yes:
            _ask(f"Reverting {request.id} ({request.text} → {request.target_new}): {price}. Go on?")
        before = session.content_hash
        reports = session.revert(edit_id, progress=progress())
        after, left = session.content_hash, len(session.active_requests())
    records = [record for report in reports for record in report.records]
    failed = [record.request.id for record in records if record.status == "failed"]
    if as_json:
        content = {
            "schema": "nmke.revert/1",
            "run": run,
            "reverted": request.id,
            "replayed": len(records),
            "failed": failed,
            "n_active": left,
            "hash_before": before,
            "content_hash": after,
        }
        print_json(content)
        return
    fact("reverted", f"{request.id}  {request.text} → {request.target_new}")
    if records:
        fact("again", f"{len(records)} edits written again, {len(failed)} of them failed: {failed or 'none'}")
    fact("head", f"content hash {before[:12]} → {after[:12]}, {left} facts left")


def _ask(question: str) -> None:
    if not sys.stdin.isatty():
        raise ConfigError(f"{question.rsplit('.', 1)[0]}; add --yes to do it without being asked")
    if not typer.confirm(question, err=True):
        raise typer.Abort
