"""Read a facts file: rows, to the shape they have, to requests with distinct ids."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

from nmke.errors import ConfigError, RequestError
from nmke.facts.record import Record, UnusableFact
from nmke.facts.rows import open_rows
from nmke.facts.shapes import Shape, find_shape
from nmke.types import EditRequest


@dataclass(frozen=True)
class FactsFile:
    """What was read.

    Args:
        requests: One request per usable record, in the file's order, ids distinct.
        shape: Name of the records' shape ("nmke", "counterfact", "zsre", "knowedit", "easyedit").
        path: The file.
        sha256: Of the file's bytes as they lie on disk, all of them, whatever the limit.
        notes: What the reader skipped or did not use, one sentence each.
        format: "jsonl", "json" or "csv".
    """

    requests: tuple[EditRequest, ...]
    shape: str
    path: Path
    sha256: str
    notes: tuple[str, ...] = ()
    format: str = "jsonl"


def read_facts(
    path: str | Path,
    *,
    limit: int | None = None,
    offset: int = 0,
    shape: str | None = None,
    derived: bool = False,
) -> FactsFile:
    """The facts of a JSONL, JSON or CSV file, gzip or not.

    Args:
        path: The file.
        limit: Read at most this many records and stop; skipped ones count, so that slices never overlap.
        offset: Leave out this many records at the start, unchecked.
        shape: Name of the records' shape; None recognises it by the first record's fields.
        derived: With CounterFact of our data folder, use its derived paraphrases and neighbours too.

    Returns:
        The requests, and what was guessed, skipped and left unused.

    Raises:
        RequestError: For every fault of the file, with file, line and field.
        ConfigError: If `limit`, `offset` or `shape` is not valid.
    """
    if (limit is not None and limit < 1) or offset < 0:
        raise ConfigError(f"limit {limit} and offset {offset}: limit is at least 1 and offset at least 0")
    path = Path(path)
    collected: _Collector | None = None
    count = 0
    with open_rows(path) as (form, rows):
        for row in rows:
            record = Record(row.data, str(path), row.line)
            collected = collected or _Collector(find_shape(record, shape), derived)
            count += 1
            if count > offset:
                collected.add(record)
            if limit is not None and count == offset + limit:
                break
    if collected is None or count <= offset:
        found = f"it holds {count} records and {offset} are left out" if count else "it is empty"
        raise RequestError(f"{path}, line 1: no fact in the file: {found}; write at least one record")
    return FactsFile(collected.finish(), collected.shape.name, path, _sha256(path), collected.notes(), form)


@dataclass
class _Collector:
    """Requests read so far, and what there is to say about the others."""

    shape: Shape
    derived: bool
    requests: dict[str, EditRequest] = field(default_factory=dict)
    lines: dict[str, int] = field(default_factory=dict)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    unused: Counter[str] = field(default_factory=Counter)
    shared: int = 0

    def add(self, record: Record) -> None:
        """Convert one record and keep it, or note why not."""
        self.unused.update(record.data.keys() - self.shape.used)
        self.shared += record.data.get("shares_subject_relation") is True
        try:
            self._keep(self.shape.convert(record, self.derived), record)
        except UnusableFact as fault:
            if self.shape.strict:
                raise
            name = str(record.data.get("case_id", f"line {record.line}"))
            self.skipped.append((name[:40], str(fault)))

    def _keep(self, request: EditRequest, record: Record) -> None:
        known = self.requests.get(request.id)
        if known is not None:
            request = self._resolve(request, known, record)
        self.requests[request.id] = request
        self.lines[request.id] = record.line

    def _resolve(self, request: EditRequest, known: EditRequest, record: Record) -> EditRequest:
        """Another id for a chance collision of derived ids; anything else is a repetition."""
        named = bool(record.data.get("id") or record.data.get("case_id") is not None)
        same = (request.prompt, request.subject, request.target_new) == (
            known.prompt,
            known.subject,
            known.target_new,
        )
        if not named and not same:
            content = "\x1f".join((request.prompt, request.subject, request.target_new))
            return replace(request, id="e" + hashlib.sha256(content.encode()).hexdigest()[:24])
        before = self.lines[known.id]
        if named:
            raise record.error("id", f"{request.id!r} is also the id of line {before}; ids must differ")
        raise record.unusable("prompt", f"the same fact as on line {before}; remove one of the two")

    def finish(self) -> tuple[EditRequest, ...]:
        """The requests, of which there must be one."""
        if not self.requests:
            raise RequestError(
                f"no fact that can be edited among {len(self.skipped)}; first: {self.skipped[0][1]}"
            )
        return tuple(self.requests.values())

    def notes(self) -> tuple[str, ...]:
        """One sentence for each thing skipped or unused."""
        notes = []
        if self.skipped:
            names = ", ".join(name for name, _ in self.skipped[:5])
            notes.append(f"{len(self.skipped)} facts skipped ({names}); first: {self.skipped[0][1]}")
        derived = {"paraphrase_prompts_rebuilt", "neighborhood_prompts_pool"}
        unused = sorted(self.unused.keys() - (derived if self.derived else set()))
        if unused:
            notes.append("fields not used: " + ", ".join(name[:40] for name in unused[:20]))
        if self.derived and derived & self.unused.keys():
            notes.append(
                "derived paraphrases and neighbours are used; they are not CounterFact's own strings"
            )
        if self.shared:
            notes.append(
                f"{self.shared} facts share subject and relation with another record of the data set"
            )
        return tuple(notes)


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as stream:
            digest = hashlib.sha256()
            while block := stream.read(2**20):
                digest.update(block)
            return digest.hexdigest()
    except OSError as error:
        raise RequestError(f"facts file {str(path)!r} cannot be read: {error}; check it") from error
