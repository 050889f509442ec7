"""`nmke prepare`: gather the statistics that a method needs ahead of editing; the cost is shown first."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nmke.cli import options
from nmke.cli.console import fact, note, print_json, progress
from nmke.cli.estimates import Cost, duration, prepare_cost, tokens_per_second
from nmke.cli.opening import Loading, load
from nmke.cli.settings import STATS_SETTINGS, merge, takes_settings

if TYPE_CHECKING:
    from nmke.preparing import Needed


@takes_settings(*STATS_SETTINGS)
def prepare(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Built-in name, folder, GGUF file or hub id.")
    ],
    config: options.Config = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the cost and stop.")] = False,
    as_json: options.Json = False,
    dtype: options.Dtype = "float32",
    device: options.Device = "auto",
    revision: options.Revision = None,
    settings: dict[str, Any] = {},  # noqa: B006 - filled by takes_settings, never changed
) -> None:
    """Gather statistics once per model; resumes where it was stopped, uses little memory, needs no data."""
    given = merge(settings, config)
    loaded = load(model, Loading(dtype, device, revision))
    from nmke.config import EditConfig
    from nmke.preparing import files, gather, needed
    from nmke.session import resolve
    from nmke.stats.store import StatsStore

    chosen, store = resolve(EditConfig.create(**given), loaded), StatsStore()
    found = needed(loaded, chosen, store)
    cost = prepare_cost(loaded, found, chosen, tokens_per_second(loaded))
    _announce(found, cost)
    begun = time.perf_counter()
    if not dry_run:
        gather(loaded, chosen, store, found, progress())
    took = time.perf_counter() - begun
    if as_json:
        content = {
            "schema": "nmke.prepare/1",
            "model": loaded.source,
            "method": chosen.method,
            "layers": list(chosen.layers or ()),
            **_state(found, dry_run),
            "corpus": {"source": chosen.corpus, "tokens": chosen.corpus_tokens},
            "estimate": vars(cost),
            "seconds": took,
            "files": [str(path) for path in files(loaded, chosen, store, found)],
        }
        print_json(content)
    elif not found:
        fact("prepared", f"method {chosen.method!r} needs no statistics")
    elif not any(one.missing for one in found):
        fact(
            "prepared",
            f"{_names(found)} of layers {_listed(chosen.layers or ())} were cached already in {store.root}",
        )
    elif not dry_run:
        fact("prepared", f"{_todo(found)} in {duration(took)}, kept in {store.root}")


def _announce(found: Sequence[Needed], cost: Cost) -> None:
    if any(one.missing for one in found):
        note(
            f"{_todo(found)}: about {duration(cost.seconds)}, {cost.memory_mb:.0f} MB of "
            f"memory, {cost.disk_mb:.0f} MB on disk (estimates); Ctrl-C is safe"
        )


def _state(found: Sequence[Needed], dry_run: bool) -> dict[str, Any]:
    """What was gathered or is missing: layers that lacked anything, and by kind."""
    from nmke.preparing import lacking

    def split(layers: Sequence[int]) -> dict[str, list[int]]:
        return {"gathered": [] if dry_run else list(layers), "missing": list(layers) if dry_run else []}

    return {**split(lacking(found)), "statistics": {one.name: split(one.missing) for one in found}}


def _todo(found: Sequence[Needed]) -> str:
    return ", ".join(f"{one.name} of layers {_listed(one.missing)}" for one in found if one.missing)


def _names(found: Sequence[Needed]) -> str:
    return " and ".join(one.name for one in found)


def _listed(layers: Sequence[int]) -> str:
    return ", ".join(map(str, layers))
