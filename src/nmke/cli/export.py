"""`nmke export`: write a run's model in a format that others load."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nmke.cli import options
from nmke.cli.console import fact, print_json, working
from nmke.cli.opening import open_run, run_folder

if TYPE_CHECKING:
    from nmke.export.base import ExportReport


def export(
    run: options.Run,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder or file to make.")],
    to: Annotated[str, typer.Option("--to", help="Format: hf, delta, lora, gguf.")] = "hf",
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier export.")] = False,
    as_json: options.Json = False,
    device: options.Device = "auto",
) -> None:
    """Write the edited model, load it back, compare its logits with the run's, and only then say done."""
    root = run_folder(run)
    from nmke.export import exporters

    exporter = exporters.get(to)
    with closing(open_run(root, device)) as session, working(f"writing and checking {output}"):
        report = exporter(session, output, force=force)
    if as_json:
        content = {**vars(report), "path": str(report.path)}
        print_json({"schema": "nmke.export/1", "run": run, **content})
        return
    fact("exported", f"{report.path} ({report.format}, {report.bytes / 1e6:.0f} MB)")
    fact("checked", f"loaded back; {agreement(report)}")
    for remark in report.notes:
        fact("note", remark)
    fact("load it", report.load)


def agreement(report: ExportReport) -> str:
    """How well the export's logits agree with the run's, in words."""
    prompts = f"logits on {report.prompts} prompts"
    if report.largest_difference == 0:
        return f"{prompts} are equal"
    return f"{prompts} differ by at most {report.largest_difference:.1g} ({report.tolerance:g} allowed)"
