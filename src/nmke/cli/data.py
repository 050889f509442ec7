"""`nmke data`: which data sets are on this machine, and fetch those that are not."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nmke.cli import options
from nmke.cli.console import fact, print_json, progress, table
from nmke.errors import ConfigError

if TYPE_CHECKING:
    from nmke.evaluation.download import Fetched

app = typer.Typer(no_args_is_help=True, help="List data sets for benchmarks and tasks, or fetch them.")


@app.command("ls")
def ls(as_json: options.Json = False) -> None:
    """List benchmarks and tasks, whether their file is here, and which can be fetched."""
    from nmke.facts import downloads

    entries = [*_benchmarks(), *_tasks()]
    if as_json:
        print_json({"schema": "nmke.data/1", "folder": str(downloads()), "entries": entries})
        return
    rows = [(e["name"], e["kind"], _state(e), e["summary"]) for e in entries]
    table(("name", "kind", "data", "what"), rows)
    here = sum(e["path"] is not None for e in entries)
    fact("data", f"{here} of {len(entries)} are here; `nmke data get NAME` fetches into {downloads()}")


@app.command("get")
def get(
    names: Annotated[
        list[str], typer.Argument(metavar="NAME", help="Benchmarks or tasks, as `ls` shows them.")
    ],
    force: Annotated[bool, typer.Option("--force", help="Fetch again what is here already.")] = False,
    as_json: options.Json = False,
) -> None:
    """Fetch data sets from their publishers; an interrupted download goes on where it broke off."""
    from nmke.evaluation.data_sets import data_sets
    from nmke.evaluation.download import fetch
    from nmke.facts import downloads

    chosen = [(name, data_sets.get(_source(name))) for name in names]
    folder, shown, found = downloads(), progress(), {}
    for name, data_set in chosen:
        found[name] = [fetch(file, folder, force=force, progress=shown) for file in data_set.files]
        if not as_json:
            _print(name, found[name], data_set.licence)
    if as_json:
        files = {name: [_as_json(file) for file in files] for name, files in found.items()}
        print_json({"schema": "nmke.data.get/1", "folder": str(folder), "files": files})


def _source(name: str) -> str:
    """The data set behind a benchmark or task.

    Raises:
        ConfigError: If there is none to fetch; names the nearest name, or says what to do instead.
    """
    from nmke.evaluation.ability import ability_tasks
    from nmke.evaluation.data_sets import data_sets, source_of

    if source_of(name) is None and name in ability_tasks:
        raise ConfigError(
            f"{name!r} cannot be fetched: its publisher offers no single file that is read as it is; put "
            f"{ability_tasks.get(name).files[0]!r} into a folder and name that in NMKE_DATA"
        )
    found = source_of(name) or name
    data_sets.entry(found)
    return found


def _print(name: str, files: list[Fetched], licence: str) -> None:
    for file in files:
        size = file.path.stat().st_size / 1e6
        done = "fetched" if file.fresh else "here already"
        known = "as known" if file.pinned else "recorded now, checked from now on"
        fact(
            name,
            f"{done}: {file.path} ({size:.1f} MB)\nsha256 {file.sha256[:12]} ({known}); licence: {licence}",
        )


def _as_json(file: Fetched) -> dict[str, Any]:
    return {"path": str(file.path), "sha256": file.sha256, "known": file.pinned, "fetched": file.fresh}


def _benchmarks() -> list[dict[str, Any]]:
    from nmke.evaluation.benchmarks import benchmarks

    return [
        _entry(e.name, "benchmark", e.value.find(), e.value.files, e.summary, e.source, asks=e.value.asks)
        for e in benchmarks
    ]


def _tasks() -> list[dict[str, Any]]:
    from nmke.evaluation import held_out
    from nmke.evaluation.ability import ability_tasks
    from nmke.facts import data_path

    found = [
        _entry(e.name, "task", e.value.find(), e.value.files, e.value.title, e.source) for e in ability_tasks
    ]
    text = next((path for name in held_out.FILES if (path := data_path(name)) is not None), None)
    return [*found, _entry("wikitext", "task", text, held_out.FILES, held_out.TITLE, "arXiv:1609.07843")]


def _entry(
    name: str, kind: str, path: Path | None, files: tuple[str, ...], summary: str, source: str, **more: Any
) -> dict[str, Any]:
    from nmke.evaluation.data_sets import source_of

    return {
        "name": name,
        "kind": kind,
        "path": None if path is None else str(path),
        "files": list(files),
        "can_fetch": source_of(name) is not None,
        "summary": summary,
        "source": source,
        **more,
    }


def _state(entry: dict[str, Any]) -> str:
    if entry["path"] is not None:
        return "here"
    return "can be fetched" if entry["can_fetch"] else "not here"
