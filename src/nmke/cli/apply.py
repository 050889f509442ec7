"""`nmke apply`: a delta written over its base, as a model folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nmke.cli import options
from nmke.cli.console import fact, print_json, working


def apply(
    delta: Annotated[Path, typer.Argument(help="Folder or file that `nmke export --to delta` wrote.")],
    base: Annotated[str, typer.Argument(help="Its base: built-in name, folder, GGUF file or hub id.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Model folder to make.")],
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier export.")] = False,
    as_json: options.Json = False,
    device: options.Device = "auto",
    revision: options.Revision = None,
) -> None:
    """Write the edited model: base weights checked first, the result equal to the exported run bit for bit."""
    from nmke.export.applied import apply_to_folder

    with working(f"writing and checking {output}"):
        report = apply_to_folder(delta, base, output, force=force, device=device, revision=revision)
    if as_json:
        content = {**vars(report), "path": str(report.path)}
        print_json({"schema": "nmke.apply/1", "delta": str(delta), "base": base, **content})
        return
    fact("applied", f"{report.path} ({report.bytes / 1e6:.0f} MB)")
    fact("checked", f"loaded back, every weight equal; content hash {report.content_hash}")
    fact("load it", report.load)
