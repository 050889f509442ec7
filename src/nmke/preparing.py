"""The statistics that a method needs before it edits: which of them are not cached yet, and gathering these.

`nmke prepare`, `nmke doctor`, `nmke edit`, the studio and the benchmarks all ask here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nmke.config import EditConfig
from nmke.editors.method import INPUT_STATISTICS, STATISTICS, methods
from nmke.models.load import EditableModel
from nmke.progress import Progress, quiet
from nmke.session import EditSession
from nmke.stats.store import INPUT_KINDS, WHAT, CorpusSpec, Kind, StatsStore

_KINDS: dict[str, tuple[Kind, ...]] = {STATISTICS: ("keys",), INPUT_STATISTICS: INPUT_KINDS}


@dataclass(frozen=True)
class Needed:
    """One kind of statistics that a method needs.

    Args:
        name: What it is called: "key statistics", "input statistics" or "subject statistics".
        kind: Its name in the cache.
        layers: The layers that the method edits.
        missing: Those of them whose statistics are not cached.
        unwritten: Whether the text they are read from is the model's own and has still to be written.
    """

    name: str
    kind: Kind
    layers: tuple[int, ...]
    missing: tuple[int, ...]
    unwritten: bool = False


def needed(model: EditableModel, config: EditConfig, store: StatsStore) -> tuple[Needed, ...]:
    """What the settings' method needs of ordinary text.

    Args:
        model: The model to edit.
        config: Resolved settings.
        store: The cache.

    Returns:
        One for each kind, none for a method that needs no statistics.

    Raises:
        LayoutError: If input statistics are needed and the model does not show what its neurons read.
    """
    layers, spec = config.layers or (), CorpusSpec.of(config)
    needs, found = methods.entry(config.method).needs, []
    for kind in (kind for need, kinds in _KINDS.items() if need in needs for kind in kinds):
        if kind in INPUT_KINDS:
            for layer in layers:  # refused now, not after minutes of gathering
                _ = model.layout.layers[layer].read_in
        missing = tuple(store.missing(model, layers, spec, kind))
        unwritten = kind != "subjects" and store.must_write_text(model, spec)
        found.append(Needed(f"{WHAT[kind]} statistics", kind, layers, missing, unwritten))
    return tuple(found)


def lacking(found: Sequence[Needed]) -> list[int]:
    """The layers that lack anything."""
    return sorted({layer for one in found for layer in one.missing})


def gather(
    model: EditableModel,
    config: EditConfig,
    store: StatsStore,
    found: Sequence[Needed],
    progress: Progress = quiet,
) -> None:
    """Gather what is missing and keep it in the cache.

    Args:
        model: The unedited model.
        config: The settings that `found` is about.
        store: The cache.
        found: What `needed` said.
        progress: Told how far it is.

    Raises:
        RequestError: If the corpus cannot be read or is too short.
    """
    for one in found:
        if one.missing:
            store.prepare(model, one.missing, CorpusSpec.of(config), progress, one.kind)


def files(model: EditableModel, config: EditConfig, store: StatsStore, found: Sequence[Needed]) -> list[Path]:
    """Where the statistics stand or would stand in the cache."""
    spec = CorpusSpec.of(config)
    keys = [key for one in found for key in store.keys_for(model, one.layers, spec, one.kind).values()]
    return [store.path(key) for key in keys]


def prepare_session(session: EditSession, progress: Progress = quiet) -> tuple[Needed, ...]:
    """Have everything that the session's settings need in the cache, gathered on the unedited weights.

    Returns:
        What was needed, and what of it had to be gathered.

    Raises:
        LayoutError, RequestError: As `needed` and `gather`.
    """
    found = needed(session.model, session.config, session.store)
    if lacking(found):
        with session.base():
            gather(session.model, session.config, session.store, found, progress)
    return found
