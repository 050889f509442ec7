"""`nmke bench`: run methods on streams of facts, show the table, compare two methods over the same facts."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from nmke.cli import options
from nmke.cli.bench_views import print_comparisons, print_methods, print_table
from nmke.cli.console import note, print_json, progress, say
from nmke.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    from nmke.bench.plan import Plan
    from nmke.bench.record import CellRecord
    from nmke.bench.runner import Bench

FAILED, INTERRUPTED = 1, 130
TimeName = Literal["after_last", "after_batch"]

app = typer.Typer(help="Run methods on streams of facts, show the table, compare two methods.")

At = Annotated[int | None, typer.Option("--at", help="After how many edits (default: the last checkpoint).")]
Time = Annotated[
    TimeName, typer.Option("--time", help="Scored after the last edit, or right after each fact's own batch.")
]


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    compare: Annotated[
        tuple[str, str] | None,
        typer.Option("--compare", metavar="A B", help="Compare two methods over the same facts."),
    ] = None,
    folder: Annotated[
        Path,
        typer.Option("--in", metavar="FOLDER", help="The benchmark to compare in (default: this folder)."),
    ] = Path(),
    at: At = None,
    when: Time = "after_last",
    list_methods: Annotated[
        bool, typer.Option("--list-methods", help="List the methods with their sources and what they need.")
    ] = False,
    as_json: options.Json = False,
) -> None:
    """Run methods on streams of facts, show the table, compare two methods."""
    if context.invoked_subcommand is not None:
        if compare or list_methods:
            raise ConfigError(
                f"--compare and --list-methods stand alone, {context.invoked_subcommand!r} was given too; drop one"
            )
    elif list_methods:
        _list_methods(as_json=as_json)
    elif compare:
        _compare(folder, compare, at, when, as_json=as_json)
    else:
        say(context.get_help())


@app.command("run", no_args_is_help=True)
def run(
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Folder of the benchmark; one that exists is gone on with.")
    ],
    plan: Annotated[
        Path | None, typer.Option("--plan", help="YAML file of these options (default: the folder's own).")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Model: built-in name, folder, GGUF file, hub id.")
    ] = None,
    methods: Annotated[
        str | None, typer.Option(help="With commas; settings in brackets: 'nmke,nmke[mask=random],unedited'.")
    ] = None,
    data: Annotated[str | None, typer.Option(help="Data sets or facts files, with commas.")] = None,
    records: Annotated[
        str | None, typer.Option(help="Pool of records in the file, START:STOP from 0.")
    ] = None,
    edits: Annotated[
        int | None, typer.Option(min=1, help="Facts of a stream (default: the whole pool).")
    ] = None,
    order: Annotated[
        str | None, typer.Option(help="shuffled: drawn from the pool by the seed; file: as they stand.")
    ] = None,
    incomplete: Annotated[
        bool, typer.Option("--incomplete", help="Take facts without paraphrase or neighbour too.")
    ] = False,
    derived: Annotated[
        bool, typer.Option("--derived", help="Score derived prompts too, not the data set's own.")
    ] = False,
    batch_sizes: Annotated[str | None, typer.Option(help="With commas.")] = None,
    seeds: Annotated[str | None, typer.Option(help="With commas.")] = None,
    checkpoints: Annotated[
        str | None, typer.Option(help="Numbers of edits to measure at, with commas; the end always is.")
    ] = None,
    protocol: Annotated[
        str | None, typer.Option(help="teacher_forced, likelihood, generation, several with commas.")
    ] = None,
    held_out_tokens: Annotated[
        int | None, typer.Option(min=2, help="Tokens of text for perplexity and KL.")
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(help="Tasks of general ability at every checkpoint, such as mmlu,arc_easy.")
    ] = None,
    task_limit: Annotated[
        int | None, typer.Option(min=1, help="Questions of a task, drawn at random.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option("-c", "--config", help="YAML file of settings for every method.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="Type of the weights: float32, bfloat16.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1.")] = None,
    retry: Annotated[bool, typer.Option("--retry", help="Run cells again that failed.")] = False,
    keep_runs: Annotated[
        bool, typer.Option("--keep-runs", help="Keep the run folders of finished cells, which are large.")
    ] = False,
    minutes: Annotated[
        float | None, typer.Option(min=0, help="Stop after so long, between two batches; run again to go on.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be run, and run nothing.")
    ] = False,
    as_json: options.Json = False,
) -> None:
    """Run every cell that is not finished: method x data x batch size x seed, one JSON record each.

    Interrupted anywhere, `nmke bench run -o FOLDER` goes on where it stopped, in the middle of a cell too.
    """
    given = {
        "model": model,
        "methods": _labels(methods),
        "data": _words(data),
        "records": records,
        "edits": edits,
        "order": order,
        "complete": False if incomplete else None,
        "derived": True if derived else None,
        "batch_sizes": _words(batch_sizes),
        "seeds": _words(seeds),
        "checkpoints": _words(checkpoints),
        "protocols": _words(protocol),
        "held_out_tokens": held_out_tokens,
        "tasks": _words(tasks),
        "task_limit": task_limit,
        "settings": None if config is None else _settings(config),
        "dtype": dtype,
        "device": device,
    }
    bench = _open(output, plan, given)
    if dry_run:
        _print_cells(bench, as_json=as_json)
        return
    shown = progress()
    for record in bench.run(
        shown, lambda r: shown.line(_news(r)), retry=retry, keep=keep_runs, stop=_clock(minutes)
    ):
        shown.line(f"{record.identity.id}: {record.status}{f', {record.reason}' if record.reason else ''}")
    _print_cells(bench, as_json=as_json)
    _end(bench, output)


def _end(bench: Bench, output: Path) -> None:
    """End with the code that tells what is left to do."""
    states = {bench.status(cell) for cell in bench.plan.cells()}
    if states & {None, "running"}:
        note(f"not finished; go on with: nmke bench run -o {output}")
        raise typer.Exit(INTERRUPTED)
    if "failed" in states:
        raise typer.Exit(FAILED)


@app.command("table")
def table(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Benchmark folder.")],
    protocol: Annotated[
        str, typer.Option(help="teacher_forced, likelihood or generation.")
    ] = "teacher_forced",
    when: Time = "after_last",
    at: At = None,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown.")] = False,
    as_json: options.Json = False,
) -> None:
    """Show a benchmark as a table: scores with 95 % intervals, perplexity, KL, drift, time and memory."""
    from nmke.bench.record import read_cells
    from nmke.bench.table import make_table, markdown

    made = make_table(read_cells(folder), protocol=protocol.replace("-", "_"), time=when, at=at)
    if as_json:
        print_json({"schema": "nmke.bench_table/1", **made.to_json()})
    elif as_markdown:
        typer.echo(markdown(made), nl=False)
    else:
        print_table(made)


def _list_methods(*, as_json: bool) -> None:
    from nmke.editors import methods

    found = [
        {
            "name": entry.name,
            "source": entry.source,
            "summary": entry.summary,
            "needs": list(entry.needs),
            "max_batch": entry.value.max_batch,
        }
        for entry in methods
    ]
    if as_json:
        print_json({"schema": "nmke.bench_methods/1", "methods": found})
    else:
        print_methods(found)


def _compare(folder: Path, labels: tuple[str, str], at: int | None, when: TimeName, *, as_json: bool) -> None:
    from nmke.bench.compare import compare
    from nmke.bench.record import read_cells

    found = compare(read_cells(folder), *labels, at=at, time=when)
    if as_json:
        print_json({"schema": "nmke.bench_compare/1", "comparisons": [one.to_json() for one in found]})
    else:
        print_comparisons(found)


def _open(output: Path, plan: Path | None, given: dict[str, Any]) -> Bench:
    """The benchmark in the folder, its plan saved there if it is another than before."""
    from nmke.bench.plan import Plan
    from nmke.bench.runner import PLAN, Bench

    own = output / PLAN
    source = plan or (own if own.is_file() else None)
    made: Plan = Plan.create(**given) if source is None else Plan.read(source, **given)
    if not own.is_file() or Plan.read(own) != made:  # a plan that somebody wrote keeps its comments
        output.mkdir(parents=True, exist_ok=True)
        made.save(own)
    return Bench(output, made)


def _news(record: CellRecord) -> str:
    """A line about the checkpoint that has just been measured."""
    from nmke.health import in_six_places

    point, identity = record.checkpoints[-1], record.identity
    words = []
    for scores in point.after_last.values():
        known = [(name, score) for name, score in scores.metrics.items() if score is not None]
        words.append(", ".join(f"{name} {score.value:.3f}" for name, score in known))
    return (
        f"{identity.label}, {identity.stream.dataset}, batch {identity.batch_size}, seed {identity.seed}: "
        f"{point.n_edits} edits, {'; '.join(words)}; perplexity {in_six_places(point.held_out.perplexity)}"
    )


def _print_cells(bench: Bench, *, as_json: bool) -> None:
    cells = [
        {
            "id": cell.id,
            "label": cell.variant.label,
            "dataset": cell.dataset,
            "batch_size": cell.config.batch_size,
            "seed": cell.config.seed,
            "status": bench.status(cell) or "not begun",
            "record": str(bench.record_path(cell)),
        }
        for cell in bench.plan.cells()
    ]
    if as_json:
        print_json({"schema": "nmke.bench_run/1", "folder": str(bench.folder), "cells": cells})
        return
    for cell in cells:
        say(
            f"{cell['status']:<10} {cell['dataset']}, batch {cell['batch_size']}, seed {cell['seed']}: {cell['label']}"
        )


def _clock(minutes: float | None) -> Callable[[], bool]:
    """Whether the time is up."""
    end = float("inf") if minutes is None else time.monotonic() + 60 * minutes
    return lambda: time.monotonic() >= end


def _settings(path: Path) -> dict[str, Any]:
    from nmke.config import read_config

    return read_config(path)


def _labels(text: str | None) -> list[str] | None:
    from nmke.bench.labels import split_labels

    return None if text is None else split_labels(text)


def _words(text: str | None) -> list[str] | None:
    return None if text is None else [word.strip() for word in text.split(",") if word.strip()]
