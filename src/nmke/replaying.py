"""What a revert edits again, found in the ledger: now, or after a process that was killed in the middle of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nmke.config import EditConfig
from nmke.ledger import Ledger
from nmke.types import EditRequest


@dataclass(frozen=True)
class PastBatch:
    """A batch to edit again.

    Args:
        requests: What is left of it.
        config: The settings it was written with.
    """

    requests: tuple[EditRequest, ...]
    config: EditConfig

    @property
    def ids(self) -> list[str]:
        """Names of its requests."""
        return [request.id for request in self.requests]


def without_edit(ledger: Ledger, batches: Sequence[int], edit_id: str) -> list[PastBatch]:
    """These batches without one edit, empty ones left out."""
    found = []
    for event in map(ledger.event, batches):
        requests = tuple(e.request for e in event.edits if e.request.id != edit_id)
        if requests:
            found.append(PastBatch(requests, EditConfig.create(**event.body["config"])))
    return found


def unfinished(ledger: Ledger) -> list[PastBatch]:
    """The batches that an interrupted revert has still to edit again, in order."""
    replay = ledger.edits.replay
    if replay is None:
        return []
    return without_edit(ledger, replay.undone, replay.reverted)[-len(replay.left) :]
