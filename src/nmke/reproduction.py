"""Edit everything again from the record alone, and compare: bit for bit where that can be asked, by scores elsewhere.

The facts, their order, the settings of every batch and the contexts come from the ledger and `nmke.json`; the base
model is loaded again; target values, keys, masks and updates are computed anew. Batches that were undone or reverted
left no bit in the model, so the active ones are edited again, in their order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from nmke.environment import environment
from nmke.errors import RequestError
from nmke.evaluation.base_outputs import collect_base
from nmke.evaluation.protocols import score
from nmke.events import Event
from nmke.ledger import Ledger
from nmke.models.load import EditableModel, load_model
from nmke.progress import Progress, quiet
from nmke.provenance import check_provenance, last_environment
from nmke.replaying import PastBatch, past_batches
from nmke.run_folder import RunFolder
from nmke.run_start import begin_run, load_base
from nmke.session import EditSession
from nmke.stats.store import StatsStore
from nmke.types import EditRequest

# How far a mean score may lie from the recorded run's: rounding that differs flips single facts that were close.
SCORE_BOUND = 0.05
PROTOCOL = "teacher_forced"
Comparison = Literal["hash", "scores"]


@dataclass(frozen=True)
class Reproduction:
    """What came of editing a run again.

    Args:
        run, output: The recorded run and the new one.
        batches: How many were edited again.
        comparison: "hash": content hashes, bit for bit; "scores": means of teacher-forced scores within `bound`.
        reproduced: Whether they agree.
        same_machine: Whether processor, threads, device and all versions are those of the record.
        differences: What is not, by name: recorded and here.
        first_difference: Name of the first batch whose content hash differs; None when none does.
        content_hash: Recorded and new.
        scores: By metric, recorded and new, both measured here; {} when hashes were compared.
        bound: How far scores may lie apart; at least one fact's worth.
    """

    run: Path
    output: Path
    batches: int
    comparison: Comparison
    reproduced: bool
    same_machine: bool
    differences: Mapping[str, tuple[Any, Any]]
    first_difference: str | None
    content_hash: tuple[str, str]
    scores: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    bound: float = SCORE_BOUND


def reproduce(
    root: Path,
    output: Path,
    *,
    model: str | EditableModel | None = None,
    device: str = "auto",
    store: StatsStore | None = None,
    progress: Progress = quiet,
) -> Reproduction:
    """Check a run's record, edit its active batches again into a new run, and compare.

    Equal content hashes settle it. Where they differ, the run is not reproduced if machine and versions are the
    recorded ones; on any other, the teacher-forced scores of both models, measured here, are compared.

    Args:
        root: The recorded run; it is only read.
        output: Folder of the new run.
        model: The base, where the recorded place does not lead to it: as `load_model` takes it, or loaded.
        device: Where it is loaded.
        store: Cache of key statistics; statistics that it lacks are gathered.
        progress: Told about each stage.

    Raises:
        RequestError: If the run holds no batch.
        VerifyError: If its record or its files were changed.
        LedgerError: If the base's weights are others, or the output is occupied.
    """
    folder = RunFolder.open(root)
    with closing(Ledger(folder.ledger)) as ledger:
        recorded = _checked_record(folder, ledger)
        past = past_batches(ledger, [event.seq for event in recorded])
    base = _load(folder, model, device)
    _verify(folder, base, store)
    again = _edit_again(folder, past, output, base, store, progress)
    return _compared(folder, output, base, store, recorded, again)


def _compared(
    folder: RunFolder,
    output: Path,
    base: EditableModel,
    store: StatsStore | None,
    recorded: Sequence[Event],
    again: Sequence[Event],
) -> Reproduction:
    """What the new run has in common with the recorded one."""
    hashes = (recorded[-1].hash_after, again[-1].hash_after)
    here = environment(base.device)
    differences = compare_environments(last_environment(recorded[-1]), here) | _statistics(recorded, again)
    by_hash = hashes[0] == hashes[1] or not differences
    scores, bound = ({}, SCORE_BOUND) if by_hash else _scores(base, folder, output, store)
    within = all(abs(one - other) <= bound for one, other in scores.values())
    return Reproduction(
        run=folder.root,
        output=output,
        batches=len(recorded),
        comparison="hash" if by_hash else "scores",
        reproduced=hashes[0] == hashes[1] if by_hash else within,
        same_machine=not differences,
        differences=differences,
        first_difference=_first_difference(recorded, again),
        content_hash=hashes,
        scores=scores,
        bound=bound,
    )


def compare_environments(recorded: Mapping[str, Any], here: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What differs, by name: recorded and here. A record without an environment differs in everything.

    Args:
        recorded: As `nmke.environment.environment` gave it then.
        here: As it gives it now.
    """
    flat = [{**side, **side.get("packages", {})} for side in (recorded, here)]
    names = [name for name in dict.fromkeys([*flat[0], *flat[1]]) if name != "packages"]
    pairs = {name: (flat[0].get(name), flat[1].get(name)) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _checked_record(folder: RunFolder, ledger: Ledger) -> list[Event]:
    """The active batches of a record that nobody changed.

    Raises:
        RequestError: If there is none.
        VerifyError: If the ledger, the manifest or `reproduce.json` was changed.
    """
    ledger.verify_chain()
    active = ledger.active()
    if not active:
        raise RequestError(f"run {str(folder.root)!r} holds no batch, so there is nothing to edit again")
    check_provenance(folder, ledger)
    return [ledger.event(seq) for seq in active]


def _load(folder: RunFolder, model: str | EditableModel | None, device: str) -> EditableModel:
    if isinstance(model, str):
        base = folder.base
        model = load_model(model, dtype=base.dtype, device=device, revision=base.revision)
    return load_base(folder, device, model)


def _verify(folder: RunFolder, model: EditableModel, store: StatsStore | None) -> None:
    """Check the recorded run's files; the model is unedited afterwards."""
    with EditSession.resume(folder, model=model, store=store) as session:
        session.verify()
        session.weights.reset()


def _edit_again(
    folder: RunFolder,
    past: Sequence[PastBatch],
    output: Path,
    base: EditableModel,
    store: StatsStore | None,
    progress: Progress,
) -> list[Event]:
    """The batches of a new run at `output`, edited from the recorded requests, settings and contexts."""
    config = past[0].config
    new = begin_run(output, base, config, folder.base.revision, folder.contexts)
    with EditSession(base, new, config, store) as session, progress.task("batches", len(past)) as task:
        for _ in session.replay(past, progress=progress):
            task.advance()
        return session.log()


def _first_difference(recorded: Sequence[Event], again: Sequence[Event]) -> str | None:
    pairs = zip(recorded, again, strict=True)
    return next((then.id for then, now in pairs if then.hash_after != now.hash_after), None)


def _statistics(recorded: Sequence[Event], again: Sequence[Event]) -> dict[str, tuple[Any, Any]]:
    """Key statistics of the newest batch that differ from the recorded ones: other statistics, other bits."""
    then, now = (dict(events[-1].body.get("statistics", {})) for events in (recorded, again))
    layers = [layer for layer in then if layer in now and then[layer] != now[layer]]
    return {f"key statistics of layer {layer}": (then[layer][:12], now[layer][:12]) for layer in layers}


def _scores(
    model: EditableModel, folder: RunFolder, output: Path, store: StatsStore | None
) -> tuple[dict[str, tuple[float, float]], float]:
    """Scores of the recorded and of the new model, both measured here, and how far they may lie apart."""
    with EditSession.resume(folder, model=model, store=store) as session:
        requests = session.active_requests()
        with session.base():
            base = collect_base(model, requests)
        recorded = _means(model, requests, base)
        session.weights.reset()
    with EditSession.resume(RunFolder(output), model=model, store=store) as session:
        again = _means(model, requests, base)
    pairs = {name: (recorded[name], again[name]) for name in recorded if name in again}
    return pairs, max(SCORE_BOUND, 1 / max(len(requests), 1))


def _means(model: EditableModel, requests: Sequence[EditRequest], base: Any) -> dict[str, float]:
    table = score(model, requests, base, (PROTOCOL,))
    metrics = table.protocols[PROTOCOL].metrics
    return {name: estimate.mean for name, estimate in metrics.items() if estimate is not None}
