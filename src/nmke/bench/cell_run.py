"""One cell while it runs: a session on the stream, batch by batch, that can be killed anywhere and taken up again.

The session's run folder holds the edits; beside it stands one small file of notes per batch (its facts' scores right
after it, and what it cost), written before the next batch begins. So after a kill at most the newest batch lacks its
notes, and the model, opened again from the run, is then just as that batch left it.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from nmke.batches import cut
from nmke.bench.labels import UNEDITED
from nmke.bench.machine import PeakMemory
from nmke.bench.plan import Cell
from nmke.bench.scores import BatchNotes
from nmke.bench.stream import Stream
from nmke.editors.known_targets import KnownTargets
from nmke.errors import LedgerError
from nmke.evaluation.base_outputs import BaseOutputs
from nmke.evaluation.protocols import score
from nmke.evaluation.score_table import RequestScores
from nmke.events import Event
from nmke.models.cache import atomic_file
from nmke.models.load import EditableModel
from nmke.preparing import prepare_session
from nmke.progress import Progress
from nmke.session import EditSession
from nmke.types import EditRequest


class CellRun:
    """The session of a cell and the notes beside it; make one with `open_cell`.

    Args:
        cell: What is run.
        session: On the cell's run folder.
        stream: The facts.
        base: The unedited model's outputs for all of them.
        notes: Folder of the notes.
        known: Targets that earlier cells found; a batch that took its own from there has no CPU time of its own.
    """

    def __init__(
        self,
        cell: Cell,
        session: EditSession,
        stream: Stream,
        base: BaseOutputs,
        notes: Path,
        known: KnownTargets | None = None,
    ) -> None:
        self.cell, self.session, self._base, self._folder = cell, session, base, notes
        self._known = known or KnownTargets()
        session.share_targets(self._known)
        self.batches: tuple[tuple[EditRequest, ...], ...] = tuple(
            tuple(batch) for batch in cut(stream.requests, cell.config)
        )
        self.peak = PeakMemory(session.model.device)
        self._check_ledger()

    @property
    def edits(self) -> bool:
        """Whether anything is written: not for the unedited model."""
        return self.cell.variant.method != UNEDITED

    @property
    def done(self) -> int:
        """How many batches are behind us, with notes."""
        return len(list(self._folder.glob("[0-9]*.json")))

    def events(self) -> list[Event]:
        """What the ledger says of every batch; nothing for the unedited model."""
        return self.session.log()

    def advance(self, progress: Progress) -> None:
        """Edit the next batch, unless only its notes are missing, and score its facts.

        Raises:
            NmkeError: As `EditSession.edit_batch`.
        """
        number, cpu = self.done, None
        batch = self.batches[number]
        if self.edits and self.session.ledger.edits.count() == number:
            begun, reused = time.process_time(), self._known.reused
            self.session.edit_batch(batch, progress=progress)
            cpu = time.process_time() - begun if self._known.reused == reused else None
        self._write(number, BatchNotes(self.score(batch), cpu, os.getloadavg()[0], self.peak.megabytes()))

    def score(self, requests: Sequence[EditRequest]) -> tuple[RequestScores, ...]:
        """Scores of the model as it is now."""
        return score(self.session.model, requests, self._base, self.cell.plan.protocols).rows

    def notes(self) -> list[BatchNotes]:
        """The notes of every batch so far."""
        paths = sorted(self._folder.glob("[0-9]*.json"))
        return [BatchNotes.from_json(json.loads(path.read_text(encoding="utf-8"))) for path in paths]

    def base(self) -> AbstractContextManager[None]:
        """The unedited model inside the `with`."""
        return self.session.base()

    def _write(self, number: int, notes: BatchNotes) -> None:
        with atomic_file(self._folder / f"{number:06d}.json") as temporary:
            temporary.write_text(json.dumps(notes.to_json(), ensure_ascii=False), encoding="utf-8")

    def _check_ledger(self) -> None:
        """Refuse a run folder that is not this cell's, or whose notes are not beside it."""
        index, root = self.session.ledger.edits, self.session.folder.root
        held = [[place.id for place in index.batch(seq)] for seq in index.batches]
        asked = [[request.id for request in batch] for batch in self.batches]
        if held != asked[: len(held)]:
            raise LedgerError(
                f"run {str(root)!r} holds other facts than the plan asks for; remove it to run the cell again"
            )
        if self.edits and not 0 <= len(held) - self.done <= 1:
            raise LedgerError(
                f"run {str(root)!r} holds {len(held)} batches and notes of {self.done}; remove it to run the cell again"
            )


@contextmanager
def open_cell(
    cell: Cell,
    model: EditableModel,
    stream: Stream,
    base: BaseOutputs,
    folder: Path,
    progress: Progress,
    known: KnownTargets | None = None,
) -> Iterator[CellRun]:
    """The cell's session, begun or taken up again; its statistics are gathered before anything is timed.

    Args:
        cell: What to run.
        model: The unedited model, shared by all cells; a session brings its weights to where its run stands.
        stream: The facts.
        base: The unedited model's outputs for them.
        folder: The cell's own folder, for the run and the notes.
        progress: Told about the statistics.
        known: Targets that earlier cells found on the unedited model.

    Raises:
        NmkeError: If settings do not go with the model, or the folder holds another cell.
    """
    notes = folder / "notes"
    notes.mkdir(parents=True, exist_ok=True)
    with EditSession.open(model, folder / "run", config=cell.config) as session:
        run = CellRun(cell, session, stream, base, notes, known)
        if run.edits:
            prepare_session(session, progress)
        try:
            yield run
        finally:
            session.weights.reset()  # the next cell begins on the unedited model
