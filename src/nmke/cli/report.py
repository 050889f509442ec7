"""`nmke report`: one HTML file about a run or a benchmark, or its parts as PNG, CSV or JSON."""

from __future__ import annotations

import json
from contextlib import closing
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import nmke
from nmke.cli import options
from nmke.cli.console import fact, note, print_json, working
from nmke.cli.measured import Measured, cached, measure
from nmke.cli.opening import is_run, open_run
from nmke.errors import ConfigError, unknown_name

if TYPE_CHECKING:
    from nmke.viz.report import Report
    from nmke.viz.run_record import RunRecord

FORMATS = ("html", "png", "csv", "json")
NAME = "report.html"
FACTS_IN_WORDS = 6
OURS = "report"  # what we write into a run folder by default begins so, and is replaced without asking


def report(
    source: Annotated[
        str, typer.Argument(metavar="RUN|BENCH", help="Run folder, or folder of benchmark cells.")
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", help="File to make; a folder for png and csv (default: in the run folder)."
        ),
    ] = None,
    form: Annotated[str, typer.Option("--format", help="html, png, csv or json.")] = "html",
    facts: Annotated[
        int, typer.Option("--facts", min=0, help="About how many facts the model's words are shown.")
    ] = FACTS_IN_WORDS,
    neurons: Annotated[
        Path | None,
        typer.Option(
            help="Record of `nmke neurons` to show (default: neurons.json in the run folder, if there)."
        ),
    ] = None,
    model: Annotated[
        bool, typer.Option(help="Load the model for its words and weights, unless they are cached.")
    ] = True,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing output.")] = False,
    as_json: options.Json = False,
    device: options.Device = "auto",
) -> None:
    """Make one self-contained HTML file: words before and after, curves, neurons, drift, health, settings."""
    if form not in FORMATS:
        raise ConfigError(unknown_name("format", form, FORMATS))
    place = _output(source, output, form, force=force)
    about_run = is_run(source)
    made = (
        _run_report(source, facts, device, neurons, model=model) if about_run else _bench_report(Path(source))
    )
    written = write_report(made, place, form)
    if as_json:
        files = [{"path": str(path), "bytes": path.stat().st_size} for path in written]
        content: dict[str, Any] = {
            "schema": "nmke.report_files/1",
            "source": source,
            "format": form,
            "files": files,
        }
        print_json(content | {"figures": [f.id for f in made.figures], "tables": [t.id for t in made.tables]})
        return
    size = sum(path.stat().st_size for path in written) / 1e3
    many = f"{len(written)} files in {place}" if form in ("png", "csv") else str(place)
    fact("report", f"{many} ({size:.0f} kB, {len(made.figures)} figures, {len(made.tables)} tables)")


def run_page(run: RunRecord, found: Measured | None, neurons: Path | None = None) -> Report:
    """The report of a run out of what its folder says and what was read off its model."""
    from nmke.viz.neuron_page import NAME as SURVEY
    from nmke.viz.neuron_page import neuron_section, read_neurons
    from nmke.viz.run_page import run_report

    survey = neurons or (run.root / SURVEY if (run.root / SURVEY).is_file() else None)

    return run_report(
        run,
        texts=found.texts if found else (),
        stability=found.stability if found else {},
        neurons=None if survey is None else neuron_section(read_neurons(survey)),
        made=_made(
            "; only the words and the distance of the weights were read off the model" if found else ""
        ),
    )


def write_report(made: Report, place: Path, form: str = "html") -> list[Path]:
    """Write the report in one of the formats; the files made."""
    from nmke.viz.parts import as_json, csv_files, png_files, write_files
    from nmke.viz.report import render

    with working(f"writing {place}"):
        if form == "csv":
            return write_files(place, csv_files(made))
        if form == "png":
            return write_files(place, png_files(made.figures))
        text = (
            render(made) if form == "html" else json.dumps(as_json(made), indent=1, ensure_ascii=False) + "\n"
        )
        return write_files(place.parent, {place.name: text})


def _run_report(source: str, facts: int, device: str, neurons: Path | None, *, model: bool) -> Report:
    from nmke.viz.run_record import read_run

    root = Path(source)
    run = read_run(root)
    found = cached(root, run.content_hash)
    if found is not None and not (found.answers_for(facts) or not model):
        found = None
    if found is None and model and run.batches:
        with closing(open_run(root, device)) as session:
            found = measure(session, facts)
        run = run if found.content_hash == run.content_hash else read_run(root)
    if found is None and run.batches:
        note("without the model: its words and the distance of its weights are left out")
    return run_page(run, found, neurons)


def _bench_report(folder: Path) -> Report:
    from nmke.bench.record import read_cells
    from nmke.viz.bench_page import bench_report

    return bench_report(folder, read_cells(folder), made=_made())


def _output(source: str, output: Path | None, form: str, *, force: bool) -> Path:
    """Where the report goes.

    Raises:
        ConfigError: If something that is not ours stands there and `force` is not given, or it is of the wrong kind.
    """
    names = {"html": NAME, "json": f"{OURS}.json", "png": f"{OURS}-png", "csv": f"{OURS}-csv"}
    place = output or Path(source) / names[form]
    folder = form in ("png", "csv")
    if place.exists() and place.is_dir() != folder:
        kind, found = ("folder", "file") if folder else ("file", "folder")
        raise ConfigError(
            f"--format {form} writes a {kind}, output {str(place)!r} is a {found}; choose another output"
        )
    occupied = any(place.iterdir()) if place.is_dir() else place.exists()
    if output is not None and occupied and not force:
        raise ConfigError(f"output {str(place)!r} exists; replace it with --force, or choose another output")
    return place


def _made(read_off: str = "") -> str:
    now = datetime.now(timezone.utc).isoformat(timespec="seconds").replace("T", " ").removesuffix("+00:00")
    by = f"Made {now} UTC by nmke {nmke.__version__} from the record{read_off}."
    return f"{by} This file asks no other host for anything."
