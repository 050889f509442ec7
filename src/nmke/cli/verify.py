"""`nmke verify`: recompute every hash of a run."""

from __future__ import annotations

from contextlib import closing

from nmke.cli import options
from nmke.cli.console import fact, print_json, working
from nmke.cli.opening import open_run, run_folder
from nmke.errors import LedgerError, VerifyError


def verify(
    run: options.Run,
    as_json: options.Json = False,
    device: options.Device = "auto",
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
