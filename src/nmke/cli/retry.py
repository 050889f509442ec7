"""`nmke retry`: edit again what did not take, with other settings."""

from __future__ import annotations

from contextlib import closing
from typing import Annotated, Any

import typer

from nmke.cli import options
from nmke.cli.console import fact, print_json, progress
from nmke.cli.opening import open_run, run_folder
from nmke.cli.settings import merge, takes_settings
from nmke.errors import HealthError, RequestError


@takes_settings()
def retry(
    run: options.Run,
    edit_ids: Annotated[
        list[str] | None,
        typer.Argument(metavar="[ID]...", help="Failed edits; none given means all of them."),
    ] = None,
    as_json: options.Json = False,
    strict: Annotated[bool, typer.Option("--strict", help="Exit 6 when an edit fails again.")] = False,
    device: options.Device = "auto",
    settings: dict[str, Any] = {},  # noqa: B006 - filled by takes_settings, never changed
) -> None:
    """Edit again what did not take, with other settings; the new edits supersede their old selves."""
    given = merge(settings)
    with closing(open_run(run_folder(run), device)) as session:
        failed = [
            place.id
            for seq in session.ledger.active()
            for place in session.ledger.edits.batch(seq)
            if place.status == "failed" and session.ledger.edits.holder(place.fact) == place
        ]
        ids = edit_ids or failed
        if not ids:
            raise RequestError(f"run {run!r} has no failed edit; `nmke log` lists its edits")
        reports = session.retry(ids, progress=progress(), **given)
        records = [record for report in reports for record in report.records]
        head = session.content_hash
    if as_json:
        edits = [{"id": r.request.id, "status": r.status, "detail": r.detail} for r in records]
        print_json({"schema": "nmke.retry/1", "run": run, "edits": edits, "content_hash": head})
    else:
        for record in records:
            reason = f": {record.detail['reason']}" if "reason" in record.detail else ""
            fact(record.status, f"{record.request.text} → {record.request.target_new}{reason}")
        fact("head", f"content hash {head[:12]}")
    again = [record.request.id for record in records if record.status == "failed"]
    if strict and again:
        raise HealthError(
            f"{len(again)} of {len(records)} edits failed again (first: {again[0]!r}): try other ones"
        )
