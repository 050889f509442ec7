"""`nmke verify`: recompute every hash of a run."""

from __future__ import annotations

from contextlib import closing
from typing import Annotated

import typer

from nmke.cli.console import fact, print_json, working
from nmke.cli.opening import open_run, run_folder
from nmke.errors import LedgerError, VerifyError


def verify(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Run folder.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1.", envvar="NMKE_DEVICE")] = "auto",
) -> None:
    """Recompute every hash: record, files, and the model as loaded from the run; exit 7 on any mismatch."""
    root = run_folder(run)
    try:
        with closing(open_run(root, device)) as session, working("recomputing hashes"):
            found = session.verify()
    except LedgerError as error:
        raise VerifyError(str(error)) from error
    if as_json:
        print_json({"schema": "nmke.verify/1", "run": run, "ok": True, **found})
        return
    fact("verified", f"{run}: {found['events']} events and {found['files']} files fit their hashes")
    fact("head", f"content hash {found['content_hash']}")
