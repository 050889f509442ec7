"""EditSession: a model whose facts are being edited, with everything needed to prove it and take it back.

The session is the only writer of weights. A batch is computed without touching the model, written to all
layers or none, saved to the run folder, and only then entered in the ledger; any error on the way restores
the exact bytes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nmke import batches
from nmke.active_edits import Replay
from nmke.batches import BatchReport, resolve, versions
from nmke.config import EditConfig, replace_config
from nmke.editors.known_targets import KnownTargets
from nmke.errors import RequestError
from nmke.events import EditRecord, Event
from nmke.facts import parse_prompt
from nmke.journal import Journal
from nmke.ledger import Ledger
from nmke.models.load import EditableModel, load_model
from nmke.progress import Progress, quiet
from nmke.provenance import write_provenance
from nmke.readable import check_editable
from nmke.replaying import PastBatch, Replayer
from nmke.run_folder import RunFolder
from nmke.run_start import begin_run, check_source, delete_run, load_base
from nmke.stats.store import StatsStore
from nmke.types import EditRequest
from nmke.weights_state import ChangedTensor, WeightsState
from nmke.writing import BatchWriter

if TYPE_CHECKING:
    from nmke.export import ExportReport

__all__ = ["BatchReport", "EditSession", "resolve", "versions"]


class EditSession:
    """A run that is open; make one with `EditSession.open`.

    Args:
        model: The unedited model; the session changes its weights in memory and never its files.
        folder: Where the run is kept.
        config: Settings of the edits to come.
        store: Cache of key statistics.
    """

    def __init__(
        self, model: EditableModel, folder: RunFolder, config: EditConfig, store: StatsStore | None = None
    ) -> None:
        self.model, self.folder, self.store = model, folder, store or StatsStore()
        self._asked, self.config = config, resolve(config, model)
        with ExitStack() as opening:
            self.ledger = Ledger(folder.ledger)
            opening.callback(self.ledger.close)
            self.weights = WeightsState(model)
            opening.callback(self.weights.side.close)
            self._journal = Journal(folder, self.ledger, self.weights)
            self._closing = opening.pop_all()
        self._writer = BatchWriter(model, self._journal, self.store)
        self._replayer = Replayer(model, self.ledger, self._journal, self._writer)

    @classmethod
    def open(
        cls,
        source: str | Path | EditableModel,
        run: str | Path | None = None,
        *,
        config: EditConfig | None = None,
        force: bool = False,
        store: StatsStore | None = None,
        dtype: str = "float32",
        device: str = "auto",
        revision: str | None = None,
    ) -> EditSession:
        """Open a run, or begin one on a model.

        Args:
            source: A run folder, or a model: built-in name, folder, GGUF file, hub id, or one already loaded.
            run: Folder of the run to begin or, when it exists, to go on with; a temporary one when None.
            config: Settings of the edits to come; None takes those that the run was given before.
            force: Delete what stands at `run` and begin anew.
            store: Cache of key statistics.
            dtype: Type of a model's weights, if it is not loaded yet.
            device: Where it is loaded to.
            revision: Which one, if it comes from the hub.

        Raises:
            ConfigError: If the run at `run` was begun on another model than the one named.
            LedgerError: If the run belongs to other weights, or its files are damaged.
        """
        loaded = source if isinstance(source, EditableModel) else None
        if loaded is None and RunFolder.exists(Path(str(source))):
            return cls.resume(RunFolder.open(Path(str(source))), config, store=store, device=device)
        with ExitStack() as opening:
            if run is None:
                temporary = tempfile.TemporaryDirectory(prefix="nmke-", ignore_cleanup_errors=True)
                run = Path(opening.enter_context(temporary)) / "run"
            root = Path(run)
            if force and root.exists():
                delete_run(root)
            if RunFolder.exists(root):
                folder = RunFolder.open(root)
                if loaded is None:
                    check_source(folder, str(source))
                return cls.resume(folder, config, store=store, device=device, model=loaded)
            model = loaded or load_model(str(source), dtype=dtype, device=device, revision=revision)
            settings = config or EditConfig.create()
            session = cls(model, begin_run(root, model, settings, revision), settings, store)
            write_provenance(session.folder, session.ledger, model)
            opening.push(session._closing.pop_all())
            session._closing = opening.pop_all()
        return session

    @classmethod
    def resume(
        cls,
        folder: RunFolder,
        config: EditConfig | None = None,
        *,
        store: StatsStore | None = None,
        device: str = "auto",
        model: EditableModel | None = None,
    ) -> EditSession:
        """Open an existing run on its own base model.

        Args:
            folder: The run.
            config: Settings of the edits to come; None takes those that the run was given before.
            store: Cache of key statistics.
            device: Where the base is loaded.
            model: The base, already loaded.

        Raises:
            ConfigError: If the run's `recipe.yaml` is damaged.
            LedgerError: If the base's weights are not those that the run was begun on.
        """
        config = config or EditConfig.create(**folder.recipe)
        return cls(load_base(folder, device, model), folder, config, store)

    def __enter__(self) -> EditSession:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the lock and close the ledger; the model keeps its edited weights, recalls nothing."""
        self._closing.close()

    @contextmanager
    def using(self, **settings: Any) -> Iterator[EditConfig]:
        """Other settings for the edits inside the `with`.

        Args:
            settings: Fields of `EditConfig` to change.

        Raises:
            ConfigError: If a setting is unknown or out of range.
        """
        before = self.config
        self.config = resolve(replace_config(self._asked, **settings), self.model)
        try:
            yield self.config
        finally:
            self.config = before

    def share_targets(self, known: KnownTargets) -> None:
        """Take the first batch's targets from `known`, or leave them there for other sessions on these facts."""
        self._writer.known = known

    # ------------------------------------------------------------------ reading

    @property
    def content_hash(self) -> str:
        """Hash of the edited model as it is now."""
        return self.weights.content_hash()

    def changed(self) -> list[ChangedTensor]:
        """The tensors that differ from the base, with how many columns."""
        return self.weights.changed()

    def base(self) -> AbstractContextManager[None]:
        """The unedited model inside the `with`, without a second copy of the weights."""
        return self.weights.base()

    def walk_back(self) -> Generator[Event, None, None]:
        """Each active batch, newest first, with the model in memory as it was right after it.

        Nothing is written to the run; when the iterator ends or is closed, the model is as before.

        Raises:
            VerifyError: If the run's files do not lead back.
        """
        return self._journal.walk_back()

    def log(self) -> list[Event]:
        """Every event of the run, oldest first."""
        return self.ledger.events()

    def active_requests(self) -> list[EditRequest]:
        """The facts that the model now holds, oldest first; superseded ones left out."""
        held = sorted((place.seq, place.position) for place in self.ledger.edits.holders())
        return [self.ledger.request(*place) for place in held]

    def verify(self) -> dict[str, Any]:
        """Recompute every hash: rows, files, and the model as loaded from the run.

        Returns:
            How many events and files were checked, and the content hash.

        Raises:
            VerifyError: At the first thing that does not fit.
        """
        return self._journal.verify()

    def pending_replay(self) -> Replay | None:
        """What an interrupted revert has still to edit again; the next write does it first."""
        return self.ledger.edits.replay

    def find(self, edit_id: str) -> tuple[int, EditRequest]:
        """Batch and request of an active edit, by id or a unique beginning of it; the newest that was written.

        Raises:
            RequestError: If none or several fit.
        """
        return self.ledger.find(edit_id)

    # ------------------------------------------------------------------ editing

    def edit(self, prompt: str, target_new: str, subject: str | None = None, **more: Any) -> EditRecord:
        """Edit one fact; marks the subject as `{France}`, or name it in `subject`.

        Args:
            prompt: "The capital of {France} is", or a template with `{}`, or plain text with the subject in it.
            target_new: The new answer.
            subject: The subject, when the prompt does not mark it.
            more: Further fields of `EditRequest`.

        Raises:
            RequestError: If the request is malformed; nothing is written then.
        """
        template, found = parse_prompt(prompt, subject)
        request = EditRequest(template, found, target_new, **more)
        return self.edit_batch([request]).records[0]

    def edit_many(
        self,
        requests: Sequence[EditRequest],
        *,
        resume: bool = False,
        progress: Progress = quiet,
        stop: Callable[[], bool] = lambda: False,
    ) -> Iterator[BatchReport]:
        """Edit facts in batches of `config.batch_size`, each committed before the next begins.

        Args:
            requests: Facts, in order; two edits of one fact go into two batches, and so do those of one subject with
                `hold_earlier`.
            resume: Skip what the run already holds instead of refusing it.
            progress: Told about each stage.
            stop: Asked between batches; True ends the run early, with everything so far saved.

        Raises:
            RequestError: If two share an id, one is in the run already without `resume`, or cannot be read.
            HealthError: If a batch crosses a stop limit; see `EditConfig.on_collapse`.
        """
        check_editable(self.model, requests)
        self._begin_writing(progress)
        todo = batches.not_in_run(requests, self.ledger.edits, resume=resume)
        for batch in batches.cut(todo, self.config):
            if stop():
                return
            yield self.edit_batch(batch, progress=progress)

    def edit_batch(self, requests: Sequence[EditRequest], *, progress: Progress = quiet) -> BatchReport:
        """Edit facts together, in one batch.

        Facts that the model says already are skipped and recorded as known; an earlier edit of the same fact is
        superseded, its keys no longer bind the solve.

        Raises:
            RequestError: If two requests ask for the same fact, or the model cannot read one.
            NumericsError: If the batch has no finite solution; the model is then unchanged.
            LedgerError: If the batch cannot be saved; the model is then unchanged.
            HealthError: If the batch crosses a stop limit; it is in the run then, unless rolled back.
        """
        check_editable(self.model, requests)
        self._begin_writing(progress)
        return self._write(requests, self.config, progress)

    def retry(self, ids: Sequence[str], *, progress: Progress = quiet, **settings: Any) -> list[BatchReport]:
        """Edit again what did not take, with other settings; the new edits supersede their old selves.

        Args:
            ids: Edits whose status is "failed".
            progress: Told about each stage.
            settings: Fields of `EditConfig` to change for these edits.

        Raises:
            RequestError: If an edit is not active or did not fail.
            ConfigError: If a setting is unknown or out of range.
        """
        config = resolve(replace_config(self._asked, **settings), self.model)
        self._begin_writing(progress)
        requests = [self.ledger.failed(name) for name in ids]
        return [self._write(batch, config, progress) for batch in batches.cut(requests, config)]

    def undo(self, n: int = 1) -> Event:
        """Take back the last `n` batches, bit for bit.

        Raises:
            RequestError: If there are fewer batches.
        """
        self._begin_writing(quiet)
        active = self.ledger.active()
        if not 1 <= n <= len(active):
            raise RequestError(
                f"undo of {n} batches asked, the run holds {len(active)}; `nmke log` lists them"
            )
        return self._journal.take_back(active[-n:], "undo", {})

    def revert(self, edit_id: str, *, progress: Progress = quiet) -> list[BatchReport]:
        """Take back one edit wherever it stands: restore to before its batch, then edit everything else again.

        Each batch is edited again with the settings it was written with. If that is interrupted, the next
        write to the run finishes it first.

        Args:
            edit_id: Its id, or a unique beginning of it.
            progress: Told about each stage.

        Returns:
            Reports of the batches that were edited again.
        """
        self._begin_writing(progress)
        self._replayer.take_back(edit_id)
        return self._replayer.finish(progress)

    def replay(self, past: Sequence[PastBatch], *, progress: Progress = quiet) -> Iterator[BatchReport]:
        """Edit batches as they were edited before, each with its own settings; health limits stop nothing.

        Args:
            past: Batches of a ledger, see `nmke.replaying`.
            progress: Told about each stage.
        """
        self._begin_writing(progress)
        yield from self._replayer.again(past, progress)

    def revert_cost(self, edit_id: str) -> dict[str, float]:
        """What `revert` would take: edits to write again, and seconds as they took before."""
        return self._replayer.cost(edit_id)

    def abandon_replay(self) -> None:
        """Give up what an interrupted revert has still to edit again; the model stays as it is."""
        self._journal.begin_writing(self._closing)
        self._replayer.abandon()

    # ------------------------------------------------------------------ writing elsewhere

    def export(self, form: str, path: str | Path, *, force: bool = False) -> ExportReport:
        """Write the edited model in a format that others load, load it back and compare its logits.

        Args:
            form: "hf", "delta", "lora", "gguf", or another of `nmke.export.exporters`.
            path: File or folder to make.
            force: Replace an earlier export that stands there.

        Returns:
            Where it stands, how far its logits are from the session's, and the line that loads it.

        Raises:
            ConfigError: If there is no such format.
            ExportError: If it cannot be written, or does not reproduce the session's logits.
            NumericsError: If a weight is not finite.
        """
        from nmke.export import exporters

        return exporters.get(form)(self, Path(path), force=force)

    # ------------------------------------------------------------------ inside

    def _begin_writing(self, progress: Progress) -> None:
        self.model.model.eval()  # someone may have trained with it: dropout would edit another model each time
        self._journal.begin_writing(self._closing)
        if self.pending_replay() is not None:
            self._replayer.finish(progress)

    def _write(self, requests: Sequence[EditRequest], config: EditConfig, progress: Progress) -> BatchReport:
        report = self._writer.write(requests, config, progress)
        self._writer.act_on_health(report, config)
        return report
