"""The solver state of a run, made from its batch files: what the solve of the next batch must keep.

It is a function of the active batches alone and always folded from the files, one batch after another, so that
a run that was stopped and opened again solves with the same bits as one that was not.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from nmke.active_edits import Place
from nmke.batch_file import read_rows
from nmke.editors.memory import SolverState
from nmke.ledger import Ledger
from nmke.run_folder import RunFolder
from nmke.types import Keys


class RunMemory:
    """Follows the ledger: batches are added as they come, and all is folded anew after some were taken back.

    Args:
        folder: The run's files.
        ledger: Its record.
        device: Where the keys are kept.
    """

    def __init__(self, folder: RunFolder, ledger: Ledger, device: torch.device) -> None:
        self._folder, self._ledger, self._device = folder, ledger, device
        self._folded: list[int] = []
        self._state = SolverState()

    def state(self) -> SolverState:
        """What is remembered of the active batches, without superseded edits."""
        active = self._ledger.active()
        if active[: len(self._folded)] != self._folded:
            self._folded, self._state = [], SolverState()
        for seq in active[len(self._folded) :]:
            self._state = self._with_batch(seq)
            self._folded.append(seq)
        return self._state

    def without(self, superseded: Sequence[Place]) -> SolverState:
        """The state for a batch that supersedes these edits."""
        return self._released(self.state(), superseded)

    def _with_batch(self, seq: int) -> SolverState:
        index = self._ledger.edits
        written = index.written(seq)
        holders = (index.holder(place.fact, before=seq) for place in written)
        state = self._released(self._state, [place for place in holders if place is not None])
        return state.remember(*self._rows(seq)) if written else state

    def _released(self, state: SolverState, places: Sequence[Place]) -> SolverState:
        for place in places:
            row = self._ledger.edits.written(place.seq).index(place)
            state = state.release(*self._rows(place.seq, row))
        return state

    def _rows(self, seq: int, edit: int | None = None) -> tuple[dict[int, Keys], dict[int, Keys]]:
        """Keys and inputs of a batch, or of one edit of it."""
        path = self._folder.root / self._folder.edits_name(seq)
        keys, inputs = (
            {layer: rows.to(self._device) for layer, rows in kind.items()} for kind in read_rows(path, edit)
        )
        return keys, inputs
