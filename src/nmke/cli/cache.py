"""`nmke cache`: what is kept, remove it, check it. Everything in it can be made again."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from nmke.cli import options
from nmke.cli.console import fact, print_json, table
from nmke.errors import ConfigError, RequestError, VerifyError

app = typer.Typer(no_args_is_help=True, help="List, remove or check what is kept between runs.")
KINDS = ("models", "stats", "scores", "data")


@dataclass(frozen=True)
class Kept:
    """One thing in the cache.

    Args:
        name: "models/NAME", "stats/NAME", "scores/NAME" or "data/NAME".
        path: Folder or file.
        bytes: Its size.
        about: What it is.
    """

    name: str
    path: Path
    bytes: int
    about: str


@app.command("ls")
def ls(
    as_json: options.Json = False,
) -> None:
    """List what is kept, with sizes."""
    from nmke.models.cache import cache_dir

    entries = list(kept())
    if as_json:
        found = [{"name": e.name, "path": str(e.path), "bytes": e.bytes, "about": e.about} for e in entries]
        print_json({"schema": "nmke.cache/1", "cache": str(cache_dir()), "entries": found})
        return
    if entries:
        rows = [(e.name.removesuffix(".safetensors"), f"{e.bytes / 1e6:.1f}", e.about) for e in entries]
        table(("name", "MB", "what"), rows, right=("MB",))
    fact("cache", f"{cache_dir()}: {len(entries)} entries, {sum(e.bytes for e in entries) / 1e6:.0f} MB")


@app.command("rm")
def rm(
    names: Annotated[
        list[str] | None, typer.Argument(help="Names as `ls` shows them, or beginnings.")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Everything.")] = False,
    yes: options.Yes = False,
) -> None:
    """Remove entries; they are made again when needed."""
    if bool(names) == everything:
        raise ConfigError("name what to remove, or give --all; `nmke cache ls` lists the names")
    entries = list(kept())
    chosen = entries if everything else [e for e in entries if any(e.name.startswith(n) for n in names or [])]
    for name in names or []:
        if not any(entry.name.startswith(name) for entry in entries):
            raise RequestError(f"nothing in the cache is called {name!r}; `nmke cache ls` lists the names")
    size = sum(entry.bytes for entry in chosen) / 1e6
    if not yes:
        if not sys.stdin.isatty():
            raise ConfigError(f"{len(chosen)} entries, {size:.0f} MB, would be removed; add --yes")
        if not typer.confirm(f"Remove {len(chosen)} entries, {size:.0f} MB?", err=True):
            raise typer.Abort
    for entry in chosen:
        if entry.path.is_dir():
            shutil.rmtree(entry.path)
        else:
            entry.path.unlink()
    fact("removed", f"{len(chosen)} entries, {size:.0f} MB")


@app.command("verify")
def verify() -> None:
    """Check that every file is whole; exit 7 if one is not."""
    entries = list(kept())
    damaged = {entry.name: fault for entry in entries if (fault := _fault(entry.path))}
    for name, fault in damaged.items():
        fact("damaged", f"{name}: {fault}")
    if damaged:
        raise VerifyError(
            f"{len(damaged)} of {len(entries)} cache entries are damaged; remove them with `nmke cache rm NAME`"
        )
    fact("verified", f"{len(entries)} entries are whole")


def kept() -> Iterator[Kept]:
    """Everything in the cache, by kind and name."""
    from nmke.models.cache import cache_dir

    for kind in KINDS:
        folder = cache_dir() / kind
        for path in sorted(folder.iterdir()) if folder.is_dir() else []:
            files = [path] if path.is_file() else [f for f in path.rglob("*") if f.is_file()]
            yield Kept(f"{kind}/{path.name}", path, sum(f.stat().st_size for f in files), _about(path))


def _about(path: Path) -> str:
    if path.is_dir():
        return "built-in model"
    if path.suffix != ".safetensors":
        if path.parent.name == "scores":
            return f"scores of an unedited model, task {path.name.rpartition('-')[0]}"
        if path.parent.name == "data":
            return "data set file"
        return "self-written corpus" if path.name.startswith("corpus-") else ""
    found = _metadata(path)
    if isinstance(found, str):
        return f"damaged: {found}"
    corpus = found.get("corpus", "?")
    return (
        f"key statistics, layer {found.get('layer')}, {found.get('count')} tokens, "
        f"corpus {corpus if len(corpus) < 24 else corpus[:12]}, weights {found.get('weights', '')[:8]}"
    )


def _fault(path: Path) -> str:
    """Why an entry cannot be used, "" when it can."""
    files = [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.is_file())
    for file in files:
        if file.suffix == ".safetensors" and isinstance(found := _metadata(file), str):
            return f"{file.name}: {found}"
    manifest = path / "nmke-builtin.json"
    if path.is_dir() and manifest.is_file():
        sizes = json.loads(manifest.read_text(encoding="utf-8"))["files"]
        wrong = [
            n for n, size in sizes.items() if not (path / n).is_file() or (path / n).stat().st_size != size
        ]
        return f"{', '.join(wrong)}: missing or of another size" if wrong else ""
    return ""


def _metadata(path: Path) -> dict[str, str] | str:
    """What a safetensors file says about itself, or why it cannot be read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            return dict(file.metadata() or {})
    except (OSError, SafetensorError) as error:
        return str(error)
