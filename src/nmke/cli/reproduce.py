"""`nmke reproduce`: edit a run's facts again from its record, and compare."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nmke.cli import options
from nmke.cli.console import fact, note, print_json, progress, table
from nmke.cli.opening import run_folder
from nmke.errors import ConfigError, VerifyError

if TYPE_CHECKING:
    from nmke.reproduction import Reproduction


def reproduce(
    run: options.Run,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="Keep the new run in this folder (default: nowhere)."),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="The base model, where the recorded place does not lead to it.")
    ] = None,
    as_json: options.Json = False,
    device: options.Device = "auto",
) -> None:
    """Edit everything again from the record, and compare: bit for bit on the same machine, by scores on another.

    Exit 7 when the run is not reproduced, or when its record was changed.
    """
    root = run_folder(run)
    if output is not None and output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"output {str(output)!r} exists; choose another folder, or leave it out")
    with TemporaryDirectory(prefix="nmke-", ignore_cleanup_errors=True) as temporary:
        from nmke.reproduction import reproduce as edit_again

        note(f"checking {run} and editing its facts again …")
        place = output or Path(temporary) / "again"
        found = edit_again(root, place, model=model, device=device, progress=progress())
    if as_json:
        print_json(_as_json(found, output))
    else:
        _print(found, output)
    if not found.reproduced:
        raise VerifyError(_why_not(found))


def _as_json(found: Reproduction, output: Path | None) -> dict[str, Any]:
    return {
        "schema": "nmke.reproduce/1",
        **asdict(found),
        "run": str(found.run),
        "output": None if output is None else str(output),
        "content_hash": {"recorded": found.content_hash[0], "again": found.content_hash[1]},
    }


def _print(found: Reproduction, output: Path | None) -> None:
    if found.differences:
        rows = [(name, str(then), str(now)) for name, (then, now) in found.differences.items()]
        table(("differs", "recorded", "here"), rows)
    how = {
        "hash": "content hashes, bit for bit",
        "scores": f"teacher-forced scores, at most {found.bound:.2f} apart (another machine: bits may differ)",
    }[found.comparison]
    fact("edited", f"{found.batches} batches again, from the record of {found.run}")
    fact("compared", how)
    if found.scores:
        pairs = found.scores.items()
        fact(
            "scores", "\n".join(f"{name} {then:.3f} recorded, {now:.3f} again" for name, (then, now) in pairs)
        )
    fact("hash", f"{found.content_hash[0][:12]} recorded, {found.content_hash[1][:12]} again")
    fact("result", "reproduced" if found.reproduced else "not reproduced")
    if output is not None:
        fact("saved", str(output))


def _why_not(found: Reproduction) -> str:
    run = f"run {str(found.run)!r} was not reproduced"
    if found.comparison == "hash":
        return (
            f"{run}: batch {found.first_difference} is the first with another content hash, on the same machine with "
            "the same versions; its record or the key statistics in the cache were changed"
        )
    return (
        f"{run}: scores lie more than {found.bound:.2f} apart; compare the versions above with those recorded, or edit "
        "on a machine like the recorded one"
    )
