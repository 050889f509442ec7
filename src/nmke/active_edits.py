"""Which edits are in the model now: an index that follows the ledger, so that nothing reads all of it again.

Batches are taken back from the end only (undo takes the newest, revert takes one and everything behind it), so
the active batches are a stack: below each of them stands what stood there when it was written.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from nmke.types import KEY_SEPARATOR

EventKind = Literal["edit", "undo", "revert"]
Status = Literal["written", "failed", "known"]


class Place(NamedTuple):
    """Where one request of an active batch stands in the ledger.

    Args:
        seq: Its batch.
        position: Its place in the batch.
        id: Its name.
        fact: Its `fact_key`.
        status: What came of it.
    """

    seq: int
    position: int
    id: str
    fact: str
    status: Status

    @property
    def subject(self) -> str:
        """Its `subject_key`."""
        return self.fact.rpartition(KEY_SEPARATOR)[2]


@dataclass(frozen=True)
class Replay:
    """The batches that a revert has still to edit again.

    Args:
        seq: The revert's number in the ledger.
        reverted: Id of the edit that was taken back.
        undone: The batches taken back with it, oldest first.
        left: Ids of each batch still to come, in order.
    """

    seq: int
    reverted: str
    undone: tuple[int, ...]
    left: tuple[tuple[str, ...], ...]


@dataclass
class ActiveEdits:
    """Index of the active batches; the ledger feeds it each event once.

    Args:
        seen: Newest event it knows.
        replay: What an unfinished revert has still to do, None when nothing.
    """

    seen: int = 0
    replay: Replay | None = None
    _batches: dict[int, list[Place]] = field(default_factory=dict)
    _by_id: dict[str, list[Place]] = field(default_factory=dict)
    _by_fact: dict[str, list[Place]] = field(default_factory=dict)
    _by_subject: dict[str, list[Place]] = field(default_factory=dict)

    def __contains__(self, edit_id: str) -> bool:
        return edit_id in self._by_id

    @property
    def batches(self) -> list[int]:
        """Sequence numbers of the active batches, oldest first."""
        return list(self._batches)

    def batch(self, seq: int) -> Sequence[Place]:
        """The requests of one active batch."""
        return self._batches[seq]

    def written(self, seq: int) -> list[Place]:
        """The requests of one active batch that its file holds keys of, in the file's order."""
        return [place for place in self._batches[seq] if place.status != "known"]

    def count(self) -> int:
        """How many batches are active."""
        return len(self._batches)

    def places(self, edit_id: str) -> Sequence[Place]:
        """Every request of that id, oldest first; several when it was retried or asked for again."""
        return self._by_id.get(edit_id, ())

    def matching(self, start: str) -> list[str]:
        """The ids that begin with `start`; only itself when it is one."""
        return [start] if start in self._by_id else [name for name in self._by_id if name.startswith(start)]

    def holder(self, fact: str, before: int | None = None) -> Place | None:
        """The edit that last wrote this fact, or the last one before the batch `before`."""
        places = reversed(self._by_fact.get(fact, ()))
        return next((place for place in places if before is None or place.seq < before), None)

    def holders(self) -> Iterator[Place]:
        """The edits that the model holds, superseded ones left out, in no particular order."""
        return (places[-1] for places in self._by_fact.values())

    def about(self, subject: str) -> list[Place]:
        """The facts about this subject that the model says, edited or known before, oldest first."""
        newest = {place.fact: place for place in self._by_subject.get(subject, ())}
        return sorted(place for place in newest.values() if place.status != "failed")

    def add(self, seq: int, rows: Sequence[tuple[int, str, str, Status]]) -> None:
        """A batch was edited; `rows` holds position, id, fact and status of its requests."""
        places = [Place(seq, *row) for row in rows]
        self._batches[seq] = places
        for place in places:
            self._by_id.setdefault(place.id, []).append(place)
            self._by_subject.setdefault(place.subject, []).append(place)
            if place.status != "known":
                self._by_fact.setdefault(place.fact, []).append(place)
        if self.replay is not None and self.replay.left[0] == tuple(place.id for place in places):
            left = self.replay.left[1:]
            self.replay = Replay(self.replay.seq, self.replay.reverted, self.replay.undone, left)
            self.replay = self.replay if left else None
        self.seen = seq

    def take_back(self, seq: int, body: dict[str, Any]) -> None:
        """Batches were undone or reverted; `body` is the event's."""
        undone = tuple(body["undone"])
        for batch in undone:
            for place in self._batches.pop(batch, ()):
                _remove(self._by_id, place.id, place)
                _remove(self._by_fact, place.fact, place)
                _remove(self._by_subject, place.subject, place)
        left = tuple(tuple(ids) for ids in body.get("replay", ()))
        self.replay = Replay(seq, body["reverted"], undone, left) if left else None
        self.seen = seq


def _remove(index: dict[str, list[Place]], name: str, place: Place) -> None:
    left = [other for other in index.get(name, ()) if other != place]
    if left:
        index[name] = left
    else:
        index.pop(name, None)
