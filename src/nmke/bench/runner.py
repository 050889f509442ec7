"""Run a benchmark: cell after cell, each leaving one record, all of it resumable."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from nmke.batches import resolve, versions
from nmke.bench.cell_run import open_cell
from nmke.bench.held_out import HeldOutText
from nmke.bench.labels import UNEDITED
from nmke.bench.machine import machine
from nmke.bench.plan import Cell, Plan
from nmke.bench.record import CELLS, CellIdentity, CellRecord, ModelIdentity, Status
from nmke.bench.steps import Steps, Told, changed, now
from nmke.bench.stream import Stream, load_stream
from nmke.editors import methods
from nmke.editors.known_targets import KnownTargets
from nmke.errors import ConfigError, LedgerError, NmkeError
from nmke.evaluation.base_outputs import BaseOutputs, collect_base
from nmke.evaluation.protocols import PROTOCOLS
from nmke.models.cache import atomic_file
from nmke.models.load import EditableModel, load_model
from nmke.progress import Progress, quiet

PLAN = "plan.yaml"
WORK = "work"
FINISHED: tuple[Status, ...] = ("done", "collapsed", "failed")


@dataclass
class Bench:
    """A benchmark folder: `plan.yaml`, `cells/` with one record each, `work/` with the runs behind them.

    Args:
        folder: Where it is.
        plan: What it runs.
        given: The model, when it is loaded already; unedited.
    """

    folder: Path
    plan: Plan
    given: EditableModel | None = None
    _streams: dict[tuple[str, int], Stream] = field(default_factory=dict)
    _known: KnownTargets = field(default_factory=KnownTargets)

    @cached_property
    def model(self) -> EditableModel:
        """The model, loaded once for all cells."""
        return self.given or load_model(self.plan.model, dtype=self.plan.dtype, device=self.plan.device)

    @cached_property
    def held_out(self) -> HeldOutText:
        """Text for perplexity and KL."""
        return HeldOutText(self.model, self.plan.held_out_tokens)

    def record_path(self, cell: Cell) -> Path:
        """The file of a cell's record."""
        return self.folder / CELLS / f"{cell.id}.json"

    def status(self, cell: Cell) -> Status | None:
        """How far a cell is, None when it was not begun."""
        path = self.record_path(cell)
        return CellRecord.load(path).status if path.is_file() else None

    def run(
        self,
        progress: Progress = quiet,
        told: Told = lambda record: None,
        *,
        retry: bool = False,
        keep: bool = False,
        stop: Callable[[], bool] = lambda: False,
    ) -> Iterator[CellRecord]:
        """Run every cell that is not finished; yields each cell's record as it ends.

        Args:
            progress: Told about each stage.
            told: Called with a cell's record after each checkpoint.
            retry: Run failed cells again, from their beginning.
            keep: Keep the run folders of finished cells: about as many bytes per batch as the edited matrices have.
            stop: Asked between batches; True ends the run early, with everything so far saved.

        Raises:
            ConfigError: If a cell's settings do not go with the model; before anything is run.
            RequestError: If a data set is missing or too small; before anything is run.
            LedgerError: If the folder holds something else, or another process writes to it.
        """
        ended = FINISHED if not retry else ("done", "collapsed")
        todo = [cell for cell in self.plan.cells() if self.status(cell) not in ended]
        for cell in todo:
            self._check(cell)
        for cell in todo:
            if stop():
                return
            record = self._run_cell(cell, progress, told, stop)
            if record.status in ("done", "collapsed") and not keep:
                self._forget(cell)
            yield record

    def _check(self, cell: Cell) -> None:
        """Read the cell's facts, and refuse settings that cannot work."""
        self._stream(cell)
        try:
            resolve(cell.config, self.model)
        except ConfigError as error:
            raise ConfigError(f"{cell.title}: {error}") from error

    def _run_cell(self, cell: Cell, progress: Progress, told: Told, stop: Callable[[], bool]) -> CellRecord:
        record, work = self._begin(cell), self.folder / WORK / cell.id
        stream = self._stream(cell)
        try:
            base = self._base_outputs(stream)
            with open_cell(cell, self.model, stream, base, work, progress, self._known) as run:
                steps = Steps(run, record, self.record_path(cell), self.held_out, told)
                with progress.task(cell.title, total=len(run.batches)) as task:
                    task.advance(run.done)
                    while steps.record.status == "running" and not stop():
                        before = run.done
                        steps.take(progress)
                        task.advance(run.done - before)
            return steps.record
        except LedgerError:
            raise  # the folder is damaged or in use, which is no result of the method
        except NmkeError as error:
            failed = changed(CellRecord.load(self.record_path(cell)), status="failed", reason=str(error))
            failed.save(self.record_path(cell))
            return failed

    def _begin(self, cell: Cell) -> CellRecord:
        """The cell's record, new or as far as it is."""
        path, identity = self.record_path(cell), self._identity(cell)
        if path.is_file():
            record = CellRecord.load(path)
            if record.identity != identity:
                raise LedgerError(
                    f"cell record {str(path)!r} is of another model or of other facts; choose another folder, or "
                    f"remove it and {str(self.folder / WORK / cell.id)!r}"
                )
            if record.status == "running":
                return record
            self._forget(cell)  # it failed, and was asked for again
        begun = now()
        record = CellRecord(
            identity=identity,
            status="running",
            created=begun,
            updated=begun,
            machine=machine(),
            versions=versions(),
        )
        record.save(path)
        return record

    def _forget(self, cell: Cell) -> None:
        """Delete the run behind a cell."""
        shutil.rmtree(self.folder / WORK / cell.id, ignore_errors=True)

    def _identity(self, cell: Cell) -> CellIdentity:
        model, edits = self.model, cell.variant.method != UNEDITED
        return CellIdentity(
            id=cell.id,
            label=cell.variant.label,
            method=cell.variant.method,
            source=methods.entry(cell.variant.method).source if edits else "",
            variant=cell.variant.settings,
            settings=resolve(cell.config, model).model_dump(mode="json") if edits else {},
            model=ModelIdentity(
                source=self.plan.model,
                name=model.name,
                fingerprint=model.fingerprint,
                dtype=str(model.dtype).removeprefix("torch."),
                device=str(model.device),
            ),
            stream=self._stream(cell).identity,
            batch_size=cell.config.batch_size,
            seed=cell.config.seed,
            checkpoints=self.plan.checkpoints,
            protocols={name: PROTOCOLS[name].version for name in self.plan.protocols},
        )

    def _stream(self, cell: Cell) -> Stream:
        key = (cell.dataset, cell.config.seed)
        if key not in self._streams:
            self._streams[key] = load_stream(self.plan, *key)
        return self._streams[key]

    def _base_outputs(self, stream: Stream) -> BaseOutputs:
        """The unedited model's outputs for the stream's facts, computed once and kept in the folder."""
        facts, fingerprint = stream.identity.facts_hash, self.model.fingerprint
        path = self.folder / WORK / "base-outputs" / f"{facts[:24]}.json"
        if path.is_file():
            found = BaseOutputs.load(path)
            if (found.facts, found.model) == (facts, fingerprint):
                return found
        collected = collect_base(self.model, stream.requests, model_hash=fingerprint)
        with atomic_file(path) as temporary:
            collected.save(temporary)
        return collected
