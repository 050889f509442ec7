"""What a ledger's rows mean: an event with its requests, its name and hash, and the checks of a row that is read."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from nmke.active_edits import EventKind, Status
from nmke.types import EditRequest, Neighbor

_FILE = re.compile(r"(edits|head)/\d{6,18}\.safetensors")


@dataclass(frozen=True)
class EditRecord:
    """One request as the ledger keeps it.

    Args:
        request: What was asked.
        status: "written", "failed" (written, but the model does not say it) or "known" (skipped, already said).
        detail: Loss, probabilities, steps, reason, what it supersedes.
    """

    request: EditRequest
    status: Status
    detail: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Event:
    """One thing that happened to a run.

    Args:
        seq: Number from 1.
        id: Short name.
        kind: "edit", "undo" or "revert".
        created: UTC time.
        body: Settings, seconds, scores, health, versions; for an undo the events it takes back.
        files: sha256 of each file of the event, by name relative to the run folder.
        hash_before, hash_after: Content hash of the edited model around it.
        chain: Hash over this row and the one before.
        edits: The requests of a batch.
    """

    seq: int
    id: str
    kind: EventKind
    created: str
    body: dict[str, Any]
    files: dict[str, str]
    hash_before: str
    hash_after: str
    previous: str
    chain: str
    edits: tuple[EditRecord, ...] = ()


def event_name(chain: str) -> str:
    """The short name of the event with this hash."""
    return f"b{chain[:8]}"


def dump(value: Any) -> str:
    """JSON in the one form that is hashed: sorted keys, no spaces."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))


def chain_hash(seq: int, values: tuple[Any, ...], edits: Sequence[tuple[Any, ...]]) -> str:
    """Hash over an event and its requests.

    Args:
        seq: Number of the event.
        values: Its row between `id` and `chain`; the last of them is the hash of the event before.
        edits: Its rows of the table `edits`.

    Returns:
        sha256 in hexadecimal.
    """
    return hashlib.sha256(dump([seq, list(values), [list(row) for row in edits]]).encode()).hexdigest()


def event_of(row: tuple[Any, ...], edits: tuple[EditRecord, ...] = ()) -> Event:
    """The event of one row.

    Args:
        row: A row of the table `events`.
        edits: Its requests, where they were read.

    Raises:
        TypeError: If the row holds no objects.
        ValueError: If it is no JSON, or names a file outside the run folder.
    """
    seq, name, kind, created, body, files, before, after, previous, chain = row
    content, named = json.loads(body), json.loads(files)
    if not isinstance(content, dict) or not isinstance(named, dict):
        raise TypeError(f"event {seq} holds no object")
    for file in named:  # a name is a path: it must not lead out of the run folder
        if not _FILE.fullmatch(file):
            raise ValueError(f"event {seq} names the file {file[:60]!r}")
    return Event(seq, name, kind, created, content, named, before, after, previous, chain, edits)


def request_of(content: dict[str, Any]) -> EditRequest:
    """The request of one row.

    Args:
        content: What `dump(asdict(request))` wrote; emptied.

    Raises:
        TypeError: If something in it is no text, or has no such name.
        KeyError: If something is missing.
    """
    neighbors = tuple(Neighbor(**n) for n in content.pop("neighborhood"))
    paraphrases = tuple(content.pop("paraphrases"))
    texts = [*content.values(), *paraphrases, *(text for n in neighbors for text in (n.prompt, n.answer))]
    if not all(text is None or isinstance(text, str) for text in texts):
        raise TypeError("a request holds something that is no text")
    return EditRequest(**content, paraphrases=paraphrases, neighborhood=neighbors)
