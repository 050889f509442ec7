"""Batches to edit again, found in the ledger: for a revert, also one killed in its middle, or for a reproduction."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from nmke.batches import BatchReport, resolve
from nmke.config import EditConfig
from nmke.journal import Journal
from nmke.ledger import Ledger
from nmke.models.load import EditableModel
from nmke.progress import Progress
from nmke.types import EditRequest
from nmke.writing import BatchWriter


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


class Replayer:
    """Takes one edit back wherever it stands, and edits what came after it again.

    Args:
        model: The session's model.
        ledger: Of the run.
        journal: Puts weights and ledger back.
        writer: Edits the batches again.
    """

    def __init__(self, model: EditableModel, ledger: Ledger, journal: Journal, writer: BatchWriter) -> None:
        self._model, self._ledger, self._journal, self._writer = model, ledger, journal, writer

    def take_back(self, edit_id: str) -> None:
        """Restore to before the edit's batch, and note in the ledger what `finish` has to edit again.

        Raises:
            RequestError: If no or no single active edit has this id.
        """
        later, request = self._from_first(edit_id)
        ids = [past.ids for past in without_edit(self._ledger, later, request.id)]
        self._journal.take_back(later, "revert", {"reverted": request.id, "replay": ids})

    def finish(self, progress: Progress) -> list[BatchReport]:
        """Edit again what is left to edit again; health is recorded, its limits stop nothing."""
        past = unfinished(self._ledger)
        with progress.task("editing the rest again", total=len(past)) as task:
            reports = []
            for report in self.again(past, progress):
                reports.append(report)
                task.advance()
        return reports

    def again(self, past: Sequence[PastBatch], progress: Progress) -> Iterator[BatchReport]:
        """Edit batches with the settings they were written with."""
        for batch in past:
            yield self._writer.write(batch.requests, resolve(batch.config, self._model), progress)

    def cost(self, edit_id: str) -> dict[str, float]:
        """What taking this edit back would take: edits to write again, and seconds as they took before."""
        later, request = self._from_first(edit_id)
        return replay_cost(self._ledger, later, request.id)

    def abandon(self) -> None:
        """Give up what is left to edit again; the model stays as it is."""
        replay = self._ledger.edits.replay
        if replay is not None:
            body = {"reverted": replay.reverted, "abandoned": [list(ids) for ids in replay.left]}
            self._journal.save("revert", {**body, "undone": []}, self._journal.checked_hash())

    def _from_first(self, edit_id: str) -> tuple[list[int], EditRequest]:
        """The active batches from the first one that holds this edit, and its request."""
        _, request = self._ledger.find(edit_id)
        places = self._ledger.edits.places(request.id)
        first = next((place for place in places if place.status != "known"), places[0])
        active = self._ledger.active()
        return active[active.index(first.seq) :], request
