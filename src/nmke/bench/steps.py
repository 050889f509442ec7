"""The steps of a running cell: batch after batch, and a checkpoint where one is due."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from itertools import accumulate
from pathlib import Path
from typing import Any

from nmke.bench.cell_run import CellRun
from nmke.bench.held_out import HeldOutText
from nmke.bench.measure import measure
from nmke.bench.record import CellRecord, Checkpoint
from nmke.errors import HealthError
from nmke.health import judge
from nmke.progress import Progress

Told = Callable[[CellRecord], None]


@dataclass
class Steps:
    """A cell on its way.

    Args:
        run: Its session and notes.
        record: Its record as far as it is.
        path: Where that is kept.
        held_out: Text for perplexity and KL.
        told: Called with the record after each checkpoint.
    """

    run: CellRun
    record: CellRecord
    path: Path
    held_out: HeldOutText
    told: Told
    _collapse: str | None = None

    def take(self, progress: Progress) -> None:
        """Measure if that is due, else edit the next batch.

        Raises:
            NmkeError: As `EditSession.edit_batch`, but for a crossed health limit, which is a result.
        """
        if self._is_due():
            self._measure()
            return
        try:
            self.run.advance(progress)
        except HealthError as error:
            self._collapse = str(error)
            self.run.advance(progress)  # the batch is in the run; its facts are scored as they are now

    def _is_due(self) -> bool:
        done, ends = self.run.done, [0, *accumulate(len(batch) for batch in self.run.batches)]
        if done == 0 or self.record.at(ends[done]) is not None:
            return False
        passed = any(ends[done - 1] < mark <= ends[done] for mark in self.record.identity.checkpoints)
        return passed or done == len(self.run.batches) or self._collapse is not None

    def _measure(self) -> None:
        point = measure(self.run, self.held_out)
        reason = self._collapse or self._crossed(point)
        ended = self.run.done == len(self.run.batches)
        self.record = changed(
            self.record,
            status="collapsed" if reason else "done" if ended else "running",
            reason=reason,
            checkpoints=(*self.record.checkpoints, point),
        )
        self.record.save(self.path)
        self.told(self.record)

    def _crossed(self, point: Checkpoint) -> str | None:
        """Which health limit the held-out text shows crossed, if a collapse ends the run."""
        config, text = self.run.session.config, point.held_out
        if config.on_collapse == "continue" or not self.run.edits:
            return None
        infinite = float("inf")
        kl = infinite if text.kl is None else text.kl
        perplexity = infinite if text.perplexity is None else text.perplexity
        status, reasons = judge(config, kl, (perplexity, text.perplexity_base), None, 0)
        return "; ".join(reasons) if status == "stop" else None


def changed(record: CellRecord, **changes: Any) -> CellRecord:
    """The record with some fields changed, and the time of that."""
    return record.model_copy(update={**changes, "updated": now()})


def now() -> str:
    """UTC, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
