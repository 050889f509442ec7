"""Read a facts file: rows, to the shape they have, to cases whose requests have distinct ids."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from nmke.errors import ConfigError, RequestError
from nmke.facts.record import Record, UnusableFact
from nmke.facts.rows import open_rows
from nmke.facts.shape import Shape
from nmke.facts.shapes import find_shape
from nmke.types import EditCase, EditRequest


@dataclass(frozen=True)
class FactsFile:
    """What was read.

    Args:
        cases: One case per usable record, in the file's order.
        shape: Name of the records' shape, such as "nmke", "counterfact", "zsre" or "mquake".
        path: The file.
        sha256: Of the file's bytes as they lie on disk, all of them, whatever the limit.
        notes: What the reader skipped or did not use, one sentence each.
        format: "jsonl", "json" or "csv".
    """

    cases: tuple[EditCase, ...]
    shape: str
    path: Path
    sha256: str
    notes: tuple[str, ...] = ()
    format: str = "jsonl"

    @cached_property
    def requests(self) -> tuple[EditRequest, ...]:
        """The facts to edit, ids distinct; most shapes have one a case."""
        return tuple(request for case in self.cases for request in case.requests)


def read_facts(
    path: str | Path,
    *,
    limit: int | None = None,
    offset: int = 0,
    shape: str | None = None,
    derived: bool = False,
    distinct: bool = False,
) -> FactsFile:
    """The facts of a JSONL, JSON or CSV file, gzip or not.

    Args:
        path: The file.
        limit: Read at most this many records and stop; skipped ones count, so that slices never overlap.
        offset: Leave out this many records at the start, unchecked.
        shape: Name of the records' shape; None recognises it by the first record's fields.
        derived: With CounterFact of our data folder, use its derived paraphrases and neighbours too.
        distinct: Leave out every case that asks for a subject and relation that an earlier one asked for (or that
            is marked so), as streams of many edits need it: none of them overwrites another.

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
            collected = collected or _Collector(find_shape(record, shape), derived, distinct)
            count += 1
            if count > offset:
                collected.add(record)
            if limit is not None and count == offset + limit:
                break
    if collected is None or count <= offset:
        found = f"it holds {count} records and {offset} are left out" if count else "it is empty"
        raise RequestError(f"{path}, line 1: no fact in the file: {found}; write at least one record")
    return FactsFile(
        collected.finish(), collected.shape.name, path, file_sha256(path), collected.notes(), form
    )


def find_faults(path: str | Path, *, most: int = 100) -> list[RequestError]:
    """Every fault of a facts file, in the file's order, where `read_facts` raises the first.

    Lines of JSONL and CSV files are looked at one by one; a JSON array that is broken ends the search.

    Args:
        path: The file.
        most: Stop after so many.
    """
    path, faults, collected = Path(path), list[RequestError](), None
    try:
        with open_rows(path, faults) as (_, rows):
            for row in rows:
                record = Record(row.data, str(path), row.line)
                try:
                    collected = collected or _Collector(
                        find_shape(record, None), derived=False, distinct=False
                    )
                    collected.add(record)
                except RequestError as fault:
                    faults.append(fault)
                if len(faults) >= most:
                    break
        if not faults:
            read_facts(path, limit=1)  # an empty file has no record to find a fault in
    except RequestError as fault:
        faults.append(fault)
    return faults[:most]


@dataclass
class _Collector:
    """Cases read so far, and what there is to say about the others."""

    shape: Shape
    derived: bool
    distinct: bool
    cases: dict[str, EditCase] = field(default_factory=dict)
    lines: dict[str, int] = field(default_factory=dict)
    asked: dict[tuple[str, str], str] = field(default_factory=dict)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    unused: Counter[str] = field(default_factory=Counter)
    shared: int = 0
    left_out: int = 0

    def add(self, record: Record) -> None:
        """Convert one record and keep it, or note why not."""
        self.unused.update(record.data.keys() - self.shape.used)
        marked = record.data.get("shares_subject_relation") is True
        self.shared += marked
        try:
            case = self.shape.convert(record, self.derived)
            if self.distinct and (marked or self._asked_before(case)):
                self.left_out += 1
                return
            self._keep(case, record)
        except UnusableFact as fault:
            if self.shape.strict:
                raise
            name = str(record.data.get("case_id", f"line {record.line}"))
            self.skipped.append((name[:40], str(fault)))

    def _asked_before(self, case: EditCase) -> bool:
        """Whether another case asks for a subject and relation of this one; remembers them if not."""
        found = {(r.subject.casefold(), (r.relation or r.prompt).casefold()) for r in case.requests}
        if any(key in self.asked for key in found):
            return True
        self.asked.update(dict.fromkeys(found, case.id))
        return False

    def _keep(self, case: EditCase, record: Record) -> None:
        known = self.cases.get(case.id)
        if known is not None:
            case = self._resolve(case, known, record)
        self.cases[case.id] = case
        self.lines[case.id] = record.line

    def _resolve(self, case: EditCase, known: EditCase, record: Record) -> EditCase:
        """Another id for a chance collision of derived ids; anything else is a repetition."""
        named = bool(record.data.get("id") or record.data.get("case_id") is not None)
        if not named and len(case.requests) == 1 and _asked(case) != _asked(known):
            request = case.requests[0]
            content = "\x1f".join((request.prompt, request.subject, request.target_new))
            longer = "e" + hashlib.sha256(content.encode()).hexdigest()[:24]
            return replace(case, id=longer, requests=(replace(request, id=longer),))
        before = self.lines[known.id]
        if named:
            raise record.error("id", f"{case.id!r} is also the id of line {before}; ids must differ")
        raise record.unusable("prompt", f"the same fact as on line {before}; remove one of the two")

    def finish(self) -> tuple[EditCase, ...]:
        """The cases, of which there must be one."""
        if not self.cases:
            raise RequestError(
                f"no fact that can be edited among {len(self.skipped)}; first: {self.skipped[0][1]}"
            )
        return tuple(self.cases.values())

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
        if self.left_out:
            notes.append(f"{self.left_out} records left out: others ask for the same subject and relation")
        elif self.shared:
            notes.append(
                f"{self.shared} facts share subject and relation with another record of the data set"
            )
        return tuple(notes)


def _asked(case: EditCase) -> list[tuple[str, str, str]]:
    return [(request.prompt, request.subject, request.target_new) for request in case.requests]


def file_sha256(path: Path) -> str:
    """Of the file's bytes as they lie on disk.

    Raises:
        RequestError: If it cannot be read.
    """
    try:
        with path.open("rb") as stream:
            digest = hashlib.sha256()
            while block := stream.read(2**20):
                digest.update(block)
            return digest.hexdigest()
    except OSError as error:
        raise RequestError(f"facts file {str(path)!r} cannot be read: {error}; check it") from error
