"""EditSession: a model whose facts are being edited, with everything needed to prove it and take it back.

The session is the only writer of weights. A batch is computed without touching the model, written to all
layers or none, saved to the run folder, and only then entered in the ledger; any error on the way restores
the exact bytes.
"""

from __future__ import annotations

import logging
import math
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import nmke
from nmke.batch_file import file_sha256, read_before, read_head, read_keys, write_batch, write_head
from nmke.config import EditConfig
from nmke.editors import methods
from nmke.editors.contexts import write_contexts
from nmke.editors.memory import SolverState
from nmke.editors.pipeline import BatchResult, compute_updates, default_layers
from nmke.errors import ConfigError, LedgerError, RequestError, VerifyError
from nmke.evaluation.target_scores import TargetScore, predictions
from nmke.facts import parse_prompt
from nmke.ledger import EditRecord, Event, Ledger
from nmke.models.load import EditableModel, load_model
from nmke.progress import Progress, quiet
from nmke.run_folder import BaseInfo, RunFolder
from nmke.stats.covariance import LayerStats
from nmke.stats.store import CorpusSpec, StatsStore
from nmke.types import EditRequest
from nmke.weights_state import ChangedTensor, WeightsState

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BatchReport:
    """What one batch did.

    Args:
        event: Its row in the ledger, with one record per request.
        seconds: Time of each stage.
        masks: Per layer, the numbers behind the neurons chosen; empty without a mask.
    """

    event: Event
    seconds: dict[str, float] = field(default_factory=dict)
    masks: dict[int, dict[str, float]] = field(default_factory=dict)

    @property
    def records(self) -> tuple[EditRecord, ...]:
        """One record per request, in order."""
        return self.event.edits


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
        self.config = resolve(config, model)
        self.ledger = Ledger(folder.ledger)
        self.weights = WeightsState(model)
        self._state: SolverState | None = None
        self._stats: dict[int, LayerStats] = {}
        self._closing = ExitStack()
        self._closing.callback(self.ledger.close)
        self._writable = False
        self._restore_head()

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
            config: Settings of the edits to come.
            force: Delete what stands at `run` and begin anew.
            store: Cache of key statistics.
            dtype, device, revision: How a model is loaded that is not yet.

        Raises:
            LedgerError: If the run belongs to other weights, or its files are damaged.
        """
        config = config or EditConfig.create()
        if not isinstance(source, EditableModel) and RunFolder.exists(Path(source)):
            folder = RunFolder.open(Path(source))
            return cls.resume(folder, config, store=store, device=device)
        temporary = None
        if run is None:
            temporary = tempfile.TemporaryDirectory(prefix="nmke-", ignore_cleanup_errors=True)
            run = Path(temporary.name) / "run"
        root = Path(run)
        if force and root.exists():
            _delete_run(root)
        if RunFolder.exists(root):
            folder = RunFolder.open(root)
            model = source if isinstance(source, EditableModel) else None
            return cls.resume(folder, config, store=store, device=device, model=model)
        model = (
            source
            if isinstance(source, EditableModel)
            else load_model(str(source), dtype=dtype, device=device, revision=revision)
        )
        session = cls(model, _begin(root, model, config, revision), config, store)
        if temporary is not None:
            session._closing.callback(temporary.cleanup)
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

        Raises:
            LedgerError: If the base's weights are not those that the run was begun on.
        """
        base = folder.base
        model = model or load_model(base.source, dtype=base.dtype, device=device, revision=base.revision)
        if model.fingerprint != base.fingerprint:
            raise LedgerError(
                f"run {str(folder.root)!r} edits weights {base.fingerprint[:12]}, {model.source!r} now has "
                f"{model.fingerprint[:12]}; give the original base model"
            )
        return cls(model, folder, config or EditConfig.create(), store)

    def __enter__(self) -> EditSession:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the lock and close the ledger; the model keeps its edited weights in memory."""
        self._closing.close()

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

    def log(self) -> list[Event]:
        """Every event of the run, oldest first."""
        return self.ledger.events()

    def active_requests(self) -> list[EditRequest]:
        """The facts that the model now holds, oldest first; superseded ones left out."""
        active = self.ledger.active()
        current = {(p[-1][0], p[-1][2]) for p in self.ledger.fact_positions(active).values()}
        events = (self.ledger.event(seq) for seq in active)
        return [e.request for event in events for e in event.edits if (event.seq, e.request.id) in current]

    def verify(self) -> dict[str, Any]:
        """Recompute every hash: rows, files, and the model as loaded from the run.

        Returns:
            How many events and files were checked, and the content hash.

        Raises:
            VerifyError: At the first thing that does not fit.
        """
        events = self.ledger.verify_chain()
        files = 0
        for event in self.ledger.events():
            for name, recorded in event.files.items():
                path = self.folder.root / name
                if name.startswith("head/") and event.seq != events:
                    continue  # only the newest head is kept
                if not path.is_file() or file_sha256(path) != recorded:
                    raise VerifyError(
                        f"{name} of event {event.id} is missing or changed; restore it from a backup"
                    )
                files += 1
        last = self.ledger.last()
        found = self.content_hash
        if last is not None and last.hash_after != found:
            raise VerifyError(
                f"the model has content hash {found[:12]}, the ledger says {last.hash_after[:12]}"
            )
        return {"events": events, "files": files, "content_hash": found}

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
            requests: Facts, in order.
            resume: Skip what the run already holds instead of refusing it.
            progress: Told about each stage.
            stop: Asked between batches; True ends the run early, with everything so far saved.

        Raises:
            RequestError: If two requests share an id, or one is in the run already and `resume` is False.
        """
        todo = self._new_requests(requests, resume)
        for begin in range(0, len(todo), self.config.batch_size):
            if stop():
                return
            yield self.edit_batch(todo[begin : begin + self.config.batch_size], progress=progress)

    def edit_batch(self, requests: Sequence[EditRequest], *, progress: Progress = quiet) -> BatchReport:
        """Edit facts together, in one batch.

        Facts that the model already says are skipped and recorded as known. A fact that was edited before is
        superseded: the old edit's keys no longer bind the solve.

        Raises:
            NumericsError: If the batch has no finite solution; the model is then unchanged.
            LedgerError: If the batch cannot be saved; the model is then unchanged.
        """
        self._begin_writing()
        before = self._ask(requests)
        known = {r.id for r, s in zip(requests, before, strict=True) if s.accuracy == 1.0}
        todo = [r for r in requests if r.id not in known]
        hash_before = self.content_hash
        if not todo:
            records = [EditRecord(r, "known", {"reason": "the model already says this"}) for r in requests]
            return BatchReport(self._append("edit", {}, {}, hash_before, hash_before, records))
        superseded = self._superseded(todo)
        stats = self._prepared(progress)
        state = self._solver_state(exclude=superseded)
        turn = self._turn()
        method = methods.get(self.config.method)
        result = compute_updates(
            self.model, method, todo, self.folder.contexts, stats, state, self.config, turn, progress
        )
        columns = self.weights.apply(result.updates)
        try:
            after = dict(zip([r.id for r in todo], self._ask(todo), strict=True))
            records = _records(requests, known, result, todo, before, after, superseded)
            name = f"edits/{turn + 1:06d}.safetensors"
            files = {name: write_batch(self.folder.root / name, result, columns)}
            masks = {layer: mask.detail for layer, mask in result.masks.items()}
            body = self._body(result, masks, superseded)
            event = self._commit("edit", body, files, hash_before, records)
        except BaseException:
            self.weights.restore(columns)
            raise
        self._state = state.remember(result.memory_keys)
        return BatchReport(event, result.seconds, masks)

    def undo(self, n: int = 1) -> Event:
        """Take back the last `n` batches, bit for bit.

        Raises:
            RequestError: If there are fewer batches.
        """
        self._begin_writing()
        active = self.ledger.active()
        if not 1 <= n <= len(active):
            raise RequestError(
                f"undo of {n} batches asked, the run holds {len(active)}; `nmke log` lists them"
            )
        return self._take_back(active[-n:], "undo", {})

    def revert(self, edit_id: str, *, progress: Progress = quiet) -> list[BatchReport]:
        """Take back one edit wherever it stands: restore to before its batch, then edit everything else again.

        Args:
            edit_id: Its id, or a unique beginning of it.
            progress: Told about each stage.

        Returns:
            Reports of the batches that were edited again.
        """
        self._begin_writing()
        seq, request = self.find(edit_id)
        active = self.ledger.active()
        later = active[active.index(seq) :]
        rest = [
            [e.request for e in self.ledger.event(s).edits if not (s == seq and e.request.id == request.id)]
            for s in later
        ]
        batches = [batch for batch in rest if batch]
        ids = [[r.id for r in batch] for batch in batches]
        self._take_back(later, "revert", {"reverted": request.id, "replay": ids})
        return [self.edit_batch(batch, progress=progress) for batch in batches]

    def revert_cost(self, edit_id: str) -> dict[str, float]:
        """What `revert` would take: edits to write again, and seconds as they took before."""
        seq, _ = self.find(edit_id)
        active = self.ledger.active()
        events = [self.ledger.event(s) for s in active[active.index(seq) :]]
        seconds = sum(sum(e.body.get("seconds", {}).values()) for e in events)
        return {"edits": sum(len(e.edits) for e in events) - 1, "seconds": seconds}

    def find(self, edit_id: str) -> tuple[int, EditRequest]:
        """Batch and request of an active edit, by id or a unique beginning of it.

        Raises:
            RequestError: If none or several fit.
        """
        known = self.ledger.known_ids(self.ledger.active())
        fits = [edit_id] if edit_id in known else [name for name in known if name.startswith(edit_id)]
        if len(fits) != 1:
            found = ", ".join(fits[:5]) or "none"
            raise RequestError(
                f"edit {edit_id!r} fits {len(fits)} active edits ({found}); `nmke log` lists the ids"
            )
        seq, position, _ = known[fits[0]]
        return seq, self.ledger.event(seq).edits[position].request

    # ------------------------------------------------------------------ inside

    def _begin_writing(self) -> None:
        if not self._writable:
            self._closing.enter_context(self.folder.locked())
            self._writable = True

    def _restore_head(self) -> None:
        last = self.ledger.last()
        if last is None:
            return
        heads = [name for name in last.files if name.startswith("head/")]
        if heads:
            self.weights.load(read_head(self.folder.root / heads[0]))
        found = self.content_hash
        if found != last.hash_after:
            raise LedgerError(
                f"run {str(self.folder.root)!r}: the restored model has content hash {found[:12]}, the ledger says "
                f"{last.hash_after[:12]}; its head file was changed: restore it from a backup"
            )

    def _ask(self, requests: Sequence[EditRequest]) -> list[TargetScore]:
        return predictions(self.model, [(r.text, r.target_new) for r in requests])

    def _new_requests(self, requests: Sequence[EditRequest], resume: bool) -> list[EditRequest]:
        seen: set[str] = set()
        for request in requests:
            if request.id in seen:
                raise RequestError(
                    f"edit id {request.id!r} occurs twice in the facts; give every fact its own id"
                )
            seen.add(request.id)
        known = self.ledger.known_ids(self.ledger.active())
        double = [r.id for r in requests if r.id in known]
        if double and not resume:
            raise RequestError(
                f"{len(double)} of {len(requests)} facts are in the run already (first: {double[0]!r}); "
                "skip them with --resume"
            )
        return [r for r in requests if r.id not in known]

    def _superseded(self, requests: Sequence[EditRequest]) -> dict[str, str]:
        """Old edit id by new edit id, where the same fact was edited before."""
        positions = self.ledger.fact_positions(self.ledger.active())
        return {r.id: positions[r.fact_key][-1][2] for r in requests if r.fact_key in positions}

    def _prepared(self, progress: Progress) -> dict[int, LayerStats]:
        assert self.config.layers is not None
        missing = [i for i in self.config.layers if i not in self._stats]
        if missing:
            spec = CorpusSpec(self.config.corpus, self.config.corpus_tokens, self.config.seed)
            with self.base():
                gathered = self.store.prepare(self.model, missing, spec, progress)
            rule, value = self.config.null_space, self.config.null_space_value
            for layer, covariance in gathered.items():
                self._stats[layer] = LayerStats(covariance.moment.to(self.model.device), rule, value)
        return self._stats

    def _solver_state(self, exclude: Mapping[str, str]) -> SolverState:
        """The key memory of the active batches, without superseded edits."""
        if self._state is not None and not exclude:
            return self._state
        active = self.ledger.active()
        positions = self.ledger.fact_positions(active)
        kept = {p[-1][:2] for p in positions.values() if p[-1][2] not in exclude.values()}
        state = SolverState()
        for seq in active:
            event = self.ledger.event(seq)
            name = next((f for f in event.files if f.startswith("edits/")), None)
            if name is None:
                continue
            written = [i for i, e in enumerate(event.edits) if e.status != "known"]
            rows = [row for row, i in enumerate(written) if (seq, i) in kept]
            if rows:
                keys = read_keys(self.folder.root / name)
                state = state.remember({i: k[rows].to(self.model.device) for i, k in keys.items()})
        return state

    def _turn(self) -> int:
        last = self.ledger.last()
        return 0 if last is None else last.seq

    def _take_back(self, events: Sequence[int], kind: Any, body: dict[str, Any]) -> Event:
        hash_before = self.content_hash
        everything = {i: p.clone() for i, p in self.weights.matrices().items()}
        try:
            for seq in reversed(events):
                event = self.ledger.event(seq)
                for name in event.files:
                    if name.startswith("edits/"):
                        self.weights.restore(read_before(self.folder.root / name))
            expected = self.ledger.event(events[0]).hash_before
            if self.content_hash != expected:
                raise LedgerError(
                    f"before-images do not lead back to content hash {expected[:12]}; run `nmke verify`"
                )
            done = self._commit(kind, {**body, "undone": list(events)}, {}, hash_before, ())
        except BaseException:
            self.weights.load(everything)
            raise
        self._state = None
        return done

    def _commit(
        self,
        kind: Any,
        body: dict[str, Any],
        files: Mapping[str, str],
        hash_before: str,
        records: Sequence[EditRecord],
    ) -> Event:
        hash_after = self.content_hash
        name = f"head/{self._turn() + 1:06d}.safetensors"
        matrices = self.weights.matrices()
        heads = {name: write_head(self.folder.root / name, matrices, hash_after)} if matrices else {}
        event = self._append(kind, body, {**files, **heads}, hash_before, hash_after, records)
        for old in self.folder.head.glob("*.safetensors"):
            if f"head/{old.name}" not in event.files:
                old.unlink(missing_ok=True)
        return event

    def _append(
        self,
        kind: Any,
        body: dict[str, Any],
        files: Mapping[str, str],
        hash_before: str,
        hash_after: str,
        records: Sequence[EditRecord],
    ) -> Event:
        created = datetime.now(timezone.utc).isoformat(timespec="seconds")
        if not files and hash_after == hash_before:
            last = self.ledger.last()
            files = {} if last is None else {n: h for n, h in last.files.items() if n.startswith("head/")}
        return self.ledger.append(
            kind,
            created=created,
            body=body,
            files=files,
            hash_before=hash_before,
            hash_after=hash_after,
            edits=records,
        )

    def _body(
        self, result: BatchResult, masks: dict[int, dict[str, float]], superseded: Mapping[str, str]
    ) -> dict[str, Any]:
        return {
            "config": self.config.model_dump(mode="json"),
            "seconds": result.seconds,
            "masks": {str(k): v for k, v in masks.items()},
            "scores": {str(k): v for k, v in result.score_summaries.items()},
            "drift": {str(k): v for k, v in self.weights.drift().items()},
            "superseded": dict(superseded),
            "versions": versions(),
        }


def resolve(config: EditConfig, model: EditableModel) -> EditConfig:
    """The settings with the method's own defaults and layers filled in.

    Raises:
        ConfigError: If layers, batch size or solver settings do not go with the method or the model.
    """
    method = methods.get(config.method)
    filled = config.filled(dict(method.defaults))
    layers = filled.layers or default_layers(model.layout.n_layers)
    if method.max_layers is not None and filled.layers is None:
        layers = layers[-method.max_layers :]
    limit = model.layout.n_layers
    if list(layers) != sorted(set(layers)) or layers[0] < 0 or layers[-1] >= limit - 1:
        raise ConfigError(
            f"layers {list(layers)} asked; this model can edit 0 to {limit - 2}, ascending and each once"
        )
    if method.max_layers is not None and len(layers) > method.max_layers:
        raise ConfigError(
            f"method {config.method!r} edits {method.max_layers} layer, {len(layers)} asked; give one"
        )
    if method.max_batch is not None and filled.batch_size > method.max_batch:
        raise ConfigError(
            f"method {config.method!r} takes batches of {method.max_batch}, {filled.batch_size} asked; lower batch_size"
        )
    return replace_config(filled, layers=tuple(layers))


def replace_config(config: EditConfig, **changes: Any) -> EditConfig:
    """The settings with some changed."""
    return EditConfig.create(**{**config.model_dump(exclude_unset=True), **changes})


def versions() -> dict[str, str]:
    """Versions of what computes."""
    import torch
    import transformers

    return {
        "nmke": nmke.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def _begin(root: Path, model: EditableModel, config: EditConfig, revision: str | None) -> RunFolder:
    dtype = str(model.dtype).removeprefix("torch.")
    base = BaseInfo(model.source, model.name, model.fingerprint, dtype, revision)
    contexts = write_contexts(model, config.context_tokens, config.seed)
    created = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return RunFolder.create(root, base, contexts, created, nmke.__version__)


def _delete_run(root: Path) -> None:
    if not RunFolder.exists(root) and any(root.iterdir()):
        raise LedgerError(
            f"--force deletes run folders only and {str(root)!r} is none; choose another output"
        )
    shutil.rmtree(root)


def _records(
    requests: Sequence[EditRequest],
    known: set[str],
    result: BatchResult,
    todo: Sequence[EditRequest],
    before: Sequence[TargetScore],
    after: Mapping[str, TargetScore],
    superseded: Mapping[str, str],
) -> list[EditRecord]:
    records = []
    place = {r.id: i for i, r in enumerate(todo)}
    for request, first in zip(requests, before, strict=True):
        if request.id in known:
            records.append(EditRecord(request, "known", {"reason": "the model already says this"}))
            continue
        index, now = place[request.id], after[request.id]
        detail: dict[str, Any] = {
            "loss": result.targets.losses[index],
            "target_probability": result.targets.probabilities[index],
            "steps": result.targets.steps[index],
            "probability_before": math.exp(first.log_prob),
            "probability_after": math.exp(now.log_prob),
        }
        if request.id in superseded:
            detail["supersedes"] = superseded[request.id]
        if now.accuracy < 1.0:
            detail["reason"] = _why_not(result.targets.probabilities[index])
        records.append(EditRecord(request, "written" if now.accuracy == 1.0 else "failed", detail))
    return records


def _why_not(target_probability: float) -> str:
    if target_probability < 0.5:
        return f"no target value was found (p = {target_probability:.2f}): try more steps, a higher lr or a larger clamp"
    return "the target was found but the write does not reach it: try a smaller batch, more layers or a wider mask"
