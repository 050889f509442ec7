"""`nmke prepare`: gather a model's key statistics ahead of editing; the cost is shown first."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from nmke.cli import options
from nmke.cli.console import fact, note, print_json, progress
from nmke.cli.estimates import duration, prepare_cost, tokens_per_second
from nmke.cli.opening import Loading, load
from nmke.cli.settings import STATS_SETTINGS, merge, takes_settings


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
    """Gather key statistics once per model; resumes where it was stopped, uses little memory, needs no data."""
    given = merge(settings, config)
    loaded = load(model, Loading(dtype, device, revision))
    from nmke.config import EditConfig
    from nmke.session import resolve
    from nmke.stats.store import CorpusSpec, StatsStore

    chosen = resolve(EditConfig.create(**given), loaded)
    layers, store = chosen.layers or (), StatsStore()
    spec = CorpusSpec(chosen.corpus, chosen.corpus_tokens, chosen.seed)
    missing = store.missing(loaded, layers, spec)
    cost = prepare_cost(loaded, missing, chosen, tokens_per_second(loaded))
    if missing:
        note(
            f"layers {_listed(missing)}: about {duration(cost.seconds)}, {cost.memory_mb:.0f} MB of "
            f"memory, {cost.disk_mb:.0f} MB on disk (estimates); Ctrl-C is safe"
        )
    begun = time.perf_counter()
    if missing and not dry_run:
        store.prepare(loaded, missing, spec, progress())
    took = time.perf_counter() - begun
    if as_json:
        content = {
            "schema": "nmke.prepare/1",
            "model": loaded.source,
            "layers": list(layers),
            "gathered": [] if dry_run else missing,
            "missing": missing if dry_run else [],
            "corpus": {"source": chosen.corpus, "tokens": chosen.corpus_tokens},
            "estimate": vars(cost),
            "seconds": took,
            "files": [str(store.path(key)) for key in store.keys_for(loaded, layers, spec).values()],
        }
        print_json(content)
    elif not missing:
        fact("prepared", f"layers {_listed(layers)} were cached already in {store.root}")
    elif not dry_run:
        fact("prepared", f"layers {_listed(missing)} in {duration(took)}, kept in {store.root}")


def _listed(layers: Sequence[int]) -> str:
    return ", ".join(map(str, layers))
