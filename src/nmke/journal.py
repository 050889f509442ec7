"""Keeps a run's model in memory, its files and its ledger in step: all of an event or nothing of it.

An event's files are written first, the ledger's row last, and old files are removed after that. So a process
killed anywhere leaves the state before the event or after it; what an unfinished one left behind is removed
when the run is next opened for writing.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime, timezone
from typing import Any

from torch import Tensor

from nmke.active_edits import EventKind
from nmke.batch_file import Before, file_sha256, read_before, read_head, write_batch, write_head
from nmke.damage import read_as
from nmke.editors.pipeline import BatchResult
from nmke.errors import LedgerError, VerifyError
from nmke.events import EditRecord, Event
from nmke.ledger import Ledger
from nmke.provenance import check_provenance, provenance_is_current, write_provenance
from nmke.run_folder import RunFolder
from nmke.weights_state import WeightsState


class Journal:
    """The only writer of a run.

    Args:
        folder: Where the run is kept.
        ledger: Its record.
        weights: The model, unedited; it is brought to the ledger's newest event.

    Raises:
        VerifyError: If files are missing or changed.
    """

    def __init__(self, folder: RunFolder, ledger: Ledger, weights: WeightsState) -> None:
        self.folder, self.ledger, self.weights = folder, ledger, weights
        self.seen = 0
        self._open = False
        self._restore()

    def begin_writing(self, closing: ExitStack) -> None:
        """Take the lock, follow what others wrote meanwhile, and clear up what a killed process left.

        Raises:
            LedgerError: If another process writes to the run; names its pid.
        """
        if self._open:
            return
        with ExitStack() as undo:
            undo.enter_context(self.folder.locked())
            if self.ledger.last_seq() != self.seen:
                self._restore()
            self._remove_leftovers()
            if not provenance_is_current(self.folder, self.ledger):
                write_provenance(self.folder, self.ledger, self.weights.model)
            closing.enter_context(undo.pop_all())
        self._open = True

    def checked_hash(self) -> str:
        """Content hash of the model, which must be where the ledger says.

        Raises:
            LedgerError: If something else wrote to the weights, or the base is swapped in.
        """
        found, last = self.weights.content_hash(), self.ledger.last()
        expected = self.weights.base_hash() if last is None else last.hash_after
        if found != expected:
            raise LedgerError(
                f"the model has content hash {found[:12]}, the run stands at {expected[:12]}: its weights were changed "
                "outside the session, or `session.base()` is still open; open the run again"
            )
        return found

    def save(
        self,
        kind: EventKind,
        body: Mapping[str, Any],
        hash_before: str,
        records: Sequence[EditRecord] = (),
        batch: tuple[BatchResult, Before] | None = None,
    ) -> Event:
        """Put an event on the disk: batch file, head file, ledger row.

        Raises:
            LedgerError: If one of them cannot be written; the ledger then says nothing of it.
        """
        seq, hash_after, files = self.seen + 1, self.weights.content_hash(), {}
        if batch is not None:
            name = self.folder.edits_name(seq)
            files[name] = write_batch(self.folder.root / name, *batch)
        tensors = self.weights.head()
        if hash_after == hash_before and not self.weights.side.tensors():
            files.update(self._last_head())
        elif tensors:
            name = self.folder.head_name(seq)
            files[name] = write_head(self.folder.root / name, tensors, hash_after)
        event = self.ledger.append(
            kind,
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            body={**body, "manifest": self.folder.digest()},
            files=files,
            hash_before=hash_before,
            hash_after=hash_after,
            edits=records,
        )
        self.seen = event.seq
        with suppress(OSError):  # the next one who opens the run for writing removes it
            self._remove_old_heads(event)
        write_provenance(self.folder, self.ledger, self.weights.model)
        return event

    @contextmanager
    def all_or_nothing(self, restore: Callable[[], None]) -> Iterator[None]:
        """Take the model back with `restore` on any error or interrupt inside, unless the ledger has the event."""
        before = self.seen
        try:
            yield
        except BaseException:
            newest = before
            with suppress(LedgerError):
                newest = self.ledger.last_seq()
            if newest == before:
                restore()
                with suppress(LedgerError, OSError):
                    self._remove_leftovers()
            self.seen = newest
            raise

    def take_back(self, events: Sequence[int], kind: EventKind, body: Mapping[str, Any]) -> Event:
        """Restore the model to before the first of these newest batches, bit for bit, and record it.

        Raises:
            LedgerError: If it cannot be saved; the model is then unchanged.
            VerifyError: If the files do not lead back to the recorded hash; the model is then unchanged.
        """
        hash_before = self.checked_hash()
        everything = {name: matrix.clone() for name, matrix in self.weights.head().items()}

        def restore() -> None:
            self.weights.reset()
            self.weights.load(everything)

        with self.all_or_nothing(restore):
            for seq in reversed(events):
                for name in filter(_is_batch, self.ledger.event(seq).files):
                    self._take_back_file(name)
            expected = self.ledger.event(events[0]).hash_before
            if self.weights.content_hash() != expected:
                raise VerifyError(
                    f"before-images do not lead back to content hash {expected[:12]}; run `nmke verify`"
                )
            return self.save(kind, {**body, "undone": list(events)}, hash_before)

    def walk_back(self) -> Generator[Event, None, None]:
        """Each active batch, newest first, with the model as it was right after it; then the model as before.

        Raises:
            VerifyError: If a batch's file does not lead back to the recorded hash.
        """
        everything = {name: matrix.clone() for name, matrix in self.weights.head().items()}
        try:
            for seq in reversed(self.ledger.active()):
                event = self.ledger.event(seq)
                if self.weights.content_hash() != event.hash_after:
                    raise VerifyError(
                        f"the files do not lead back to the state after batch {event.id}, content hash "
                        f"{event.hash_after[:12]}; run `nmke verify`"
                    )
                yield event
                for name in filter(_is_batch, event.files):
                    self._take_back_file(name)
        finally:
            self.weights.reset()
            self.weights.load(everything)

    def verify(self) -> dict[str, Any]:
        """Recompute every hash: rows, files, manifest, and the model in memory.

        Returns:
            How many events and files were checked, and the content hash.

        Raises:
            VerifyError: At the first thing that does not fit.
        """
        events, files = self.ledger.verify_chain(), 0
        for event in self.ledger.events():
            for name, recorded in event.files.items():
                if _is_batch(name) or event.seq == events:  # of the heads only the newest is kept
                    self._check_file(event.id, name, recorded)
                    files += 1
        last, found = self.ledger.last(), self.weights.content_hash()
        if last is not None and last.hash_after != found:
            raise VerifyError(
                f"the model has content hash {found[:12]}, the ledger says {last.hash_after[:12]}"
            )
        if last is not None and last.body["manifest"] != self.folder.digest():
            raise VerifyError(
                f"nmke.json was changed after event {last.id} was written; restore it from a backup"
            )
        check_provenance(self.folder, self.ledger)
        return {"events": events, "files": files, "content_hash": found}

    def _restore(self) -> None:
        """Bring the model to the newest event."""
        newest_file = self.folder.newest_file()
        last, matrices = self._read_newest()
        self.seen = 0 if last is None else last.seq
        if newest_file > self.seen + 1:
            raise VerifyError(
                f"run {str(self.folder.root)!r} has a file of event {newest_file}, its ledger ends at {self.seen}: "
                "restore the ledger from a backup"
            )
        self.weights.reset()
        install(matrices, self.weights, f"the head file of run {str(self.folder.root)!r}")
        found = self.weights.content_hash()
        if last is not None and found != last.hash_after:
            raise VerifyError(
                f"run {str(self.folder.root)!r}: the restored model has content hash {found[:12]}, the ledger says "
                f"{last.hash_after[:12]}; restore the run from a backup"
            )

    def _read_newest(self) -> tuple[Event | None, dict[str, Tensor]]:
        """The newest event and its matrices; a writer may replace both while this process reads."""
        while True:
            last = self.ledger.last()
            heads = {} if last is None else _heads(last)
            try:
                for name, recorded in heads.items():
                    self._check_file("" if last is None else last.id, name, recorded)
                    return last, read_head(self.folder.root / name)
                return last, {}
            except LedgerError:
                if last is None or self.ledger.last_seq() == last.seq:
                    raise

    def _take_back_file(self, name: str) -> None:
        before = read_before(self.folder.root / name)
        with read_as(f"batch file {name!r}"):
            self.weights.take_back(before)

    def _check_file(self, event_id: str, name: str, recorded: str) -> None:
        path = self.folder.root / name
        if not path.is_file() or file_sha256(path) != recorded:
            raise VerifyError(f"{name} of event {event_id} is missing or changed; restore it from a backup")

    def _last_head(self) -> dict[str, str]:
        last = self.ledger.last()
        return {} if last is None else _heads(last)

    def _remove_leftovers(self) -> None:
        batches = filter(_is_batch, self.ledger.file_names())
        self.folder.remove_leftovers({*batches, *self._last_head()})

    def _remove_old_heads(self, event: Event) -> None:
        for old in self.folder.head.glob("*.safetensors"):
            if f"head/{old.name}" not in event.files:
                old.unlink(missing_ok=True)


def install(matrices: Mapping[str, Tensor], weights: WeightsState, what: str) -> None:
    """Put a head file's content into the model.

    Args:
        matrices: As `read_head` gives them.
        weights: The unedited model.
        what: The file, for the message.

    Raises:
        LedgerError: If they do not fit the model.
    """
    with read_as(what):
        weights.load(matrices)
        weights.side.try_recall()


def _heads(event: Event) -> dict[str, str]:
    return {name: recorded for name, recorded in event.files.items() if not _is_batch(name)}


def _is_batch(name: str) -> bool:
    return name.startswith("edits/")
