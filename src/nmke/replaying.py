"""Batches to edit again, found in the ledger: for a revert, also one killed in its middle, or for a reproduction."""

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


def past_batches(ledger: Ledger, batches: Sequence[int]) -> list[PastBatch]:
    """These batches as they were."""
    return without_edit(ledger, batches, "")


def without_edit(ledger: Ledger, batches: Sequence[int], edit_id: str) -> list[PastBatch]:
    """These batches without one edit, empty ones left out."""
    found = []
    for event in map(ledger.event, batches):
        requests = tuple(e.request for e in event.edits if e.request.id != edit_id)
        if requests:
            found.append(PastBatch(requests, EditConfig.create(**event.body["config"])))
    return found


def replay_cost(ledger: Ledger, batches: Sequence[int], edit_id: str) -> dict[str, float]:
    """What `without_edit` would take: edits to write again, and the seconds that these batches took before."""
    events = [ledger.event(seq) for seq in batches]
    again = [edit for event in events for edit in event.edits if edit.request.id != edit_id]
    return {"edits": len(again), "seconds": sum(sum(e.body.get("seconds", {}).values()) for e in events)}


def unfinished(ledger: Ledger) -> list[PastBatch]:
    """The batches that an interrupted revert has still to edit again, in order."""
    replay = ledger.edits.replay
    if replay is None:
        return []
    return without_edit(ledger, replay.undone, replay.reverted)[-len(replay.left) :]
