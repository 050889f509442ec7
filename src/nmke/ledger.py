"""The append-only record of a run: every batch, undo and failed edit, hash-chained, in one SQLite file.

An event is committed in one transaction after its files are safely on disk, so a process killed at any
moment leaves the state before the event or after it. Rows are never changed: triggers refuse it, and each
row carries a hash over itself and the row before.
"""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nmke.active_edits import ActiveEdits, EventKind, Status
from nmke.errors import LedgerError, RequestError, VerifyError
from nmke.events import EditRecord, Event, chain_hash, dump, event_name, event_of, request_of
from nmke.types import EditRequest

_SCHEMA = """
CREATE TABLE IF NOT EXISTS events (
  seq INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, kind TEXT NOT NULL, created TEXT NOT NULL,
  body TEXT NOT NULL, files TEXT NOT NULL, hash_before TEXT NOT NULL, hash_after TEXT NOT NULL,
  previous TEXT NOT NULL, chain TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS edits (
  seq INTEGER NOT NULL REFERENCES events(seq), position INTEGER NOT NULL, id TEXT NOT NULL,
  fact_key TEXT NOT NULL, status TEXT NOT NULL, request TEXT NOT NULL, detail TEXT NOT NULL,
  PRIMARY KEY (seq, position)
);
CREATE INDEX IF NOT EXISTS edits_by_id ON edits (id);
CREATE INDEX IF NOT EXISTS edits_by_fact ON edits (fact_key);
CREATE TRIGGER IF NOT EXISTS events_fixed BEFORE UPDATE ON events BEGIN SELECT RAISE(ABORT, 'append-only'); END;
CREATE TRIGGER IF NOT EXISTS events_kept BEFORE DELETE ON events BEGIN SELECT RAISE(ABORT, 'append-only'); END;
CREATE TRIGGER IF NOT EXISTS edits_fixed BEFORE UPDATE ON edits BEGIN SELECT RAISE(ABORT, 'append-only'); END;
CREATE TRIGGER IF NOT EXISTS edits_kept BEFORE DELETE ON edits BEGIN SELECT RAISE(ABORT, 'append-only'); END;
"""

_SEARCHED = """(id || char(10) || replace(json_extract(request, '$.prompt'), '{}', json_extract(request, '$.subject'))
  || char(10) || json_extract(request, '$.target_new'))"""
Row = tuple[int, int]
_DAMAGE = (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError, OverflowError)


class Ledger:
    """Reader and the only writer of a run's record.

    Args:
        path: The SQLite file; created when missing.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._index = ActiveEdits()
        self._left_open = False
        try:
            self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            self._db.execute("PRAGMA trusted_schema=OFF")
            _refuse_foreign(self._db)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            self._db.executescript(_SCHEMA)
        except sqlite3.Error as error:
            raise _damaged(error)(
                f"ledger {str(path)!r} cannot be opened ({error}); restore it from a backup"
            ) from error

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        try:
            self._close_left_open()
            yield self._db
        except (sqlite3.Error, *_DAMAGE) as error:
            raise _damaged(error)(
                f"ledger {str(self._path)!r} is damaged ({error}); restore it from a backup"
            ) from error

    def _close_left_open(self) -> None:
        """Roll back what a failed append left open: until then its rows would be read as if they were kept."""
        if self._left_open:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            self._left_open = False

    def append(
        self,
        kind: EventKind,
        *,
        created: str,
        body: Mapping[str, Any],
        files: Mapping[str, str],
        hash_before: str,
        hash_after: str,
        edits: Sequence[EditRecord] = (),
    ) -> Event:
        """Add one event with its edits, in one transaction.

        Raises:
            LedgerError: If it cannot be written; then nothing is.
        """
        last = self.last()
        seq = 1 if last is None else last.seq + 1
        previous = "" if last is None else last.chain
        values = (kind, created, dump(body), dump(files), hash_before, hash_after, previous)
        rows = [
            (seq, i, e.request.id, e.request.fact_key, e.status, dump(asdict(e.request)), dump(e.detail))
            for i, e in enumerate(edits)
        ]
        chain = chain_hash(seq, values, rows)
        try:
            self._db.execute("BEGIN IMMEDIATE")
            self._db.execute(
                "INSERT INTO events VALUES (?,?,?,?,?,?,?,?,?,?)", (seq, event_name(chain), *values, chain)
            )
            self._db.executemany("INSERT INTO edits VALUES (?,?,?,?,?,?,?)", rows)
            self._db.execute("COMMIT")
        except BaseException as error:  # an interrupt too must not leave the transaction open
            self._left_open = True
            with suppress(sqlite3.Error):  # a rollback that fails too is done before the next use
                self._close_left_open()
            if not isinstance(error, sqlite3.Error):
                raise
            raise LedgerError(
                f"event {seq} could not be written to {str(self._path)!r} ({error}); nothing was changed: "
                "free disk space or check permissions, then run again with --resume"
            ) from error
        return event_of((seq, event_name(chain), *values, chain), tuple(edits))

    def last_seq(self) -> int:
        """Number of the newest event, 0 when there is none."""
        with self._reading() as db:
            return int(db.execute("SELECT coalesce(max(seq), 0) FROM events").fetchone()[0])

    def last(self) -> Event | None:
        """The newest event, without its edits."""
        with self._reading() as db:
            row = db.execute("SELECT * FROM events ORDER BY seq DESC LIMIT 1").fetchone()
            return None if row is None else event_of(row)

    def event(self, seq: int) -> Event:
        """One event with its edits."""
        with self._reading() as db:
            row = db.execute("SELECT * FROM events WHERE seq = ?", (seq,)).fetchone()
            if row is None:
                raise LedgerError(f"there is no event {seq} in {str(self._path)!r}; `nmke log` lists them")
            return event_of(row, self._edits(seq))

    def events(self) -> list[Event]:
        """Every event with its edits, oldest first."""
        with self._reading() as db:
            rows = db.execute("SELECT * FROM events ORDER BY seq").fetchall()
            return [event_of(row, self._edits(row[0])) for row in rows]

    def _edits(self, seq: int) -> tuple[EditRecord, ...]:
        rows = self._db.execute(
            "SELECT status, request, detail FROM edits WHERE seq = ? ORDER BY position", (seq,)
        ).fetchall()
        return tuple(EditRecord(request_of(json.loads(r)), s, json.loads(d)) for s, r, d in rows)

    @property
    def edits(self) -> ActiveEdits:
        """The index of active edits, brought up to the newest event."""
        with self._reading() as db:
            fresh = db.execute(
                "SELECT seq, kind, CASE kind WHEN 'edit' THEN '' ELSE body END FROM events WHERE seq > ? ORDER BY seq",
                (self._index.seen,),
            ).fetchall()
            for seq, kind, body in fresh:
                if kind == "edit":
                    query = "SELECT position, id, fact_key, status FROM edits WHERE seq = ? ORDER BY position"
                    self._index.add(seq, db.execute(query, (seq,)).fetchall())
                else:
                    self._index.take_back(seq, json.loads(body))
        return self._index

    def active(self) -> list[int]:
        """Sequence numbers of the batches whose writes are in the model, oldest first."""
        return self.edits.batches

    def known_ids(self, active: Sequence[int]) -> dict[str, tuple[int, int, Status]]:
        """Requests of these active batches by id: batch, position and status."""
        index = self.edits
        return {p.id: (p.seq, p.position, p.status) for seq in active for p in index.batch(seq)}

    def request(self, seq: int, position: int) -> EditRequest:
        """One request of a batch."""
        with self._reading() as db:
            query = "SELECT request FROM edits WHERE seq = ? AND position = ?"
            return request_of(json.loads(db.execute(query, (seq, position)).fetchone()[0]))

    def find(self, edit_id: str) -> tuple[int, EditRequest]:
        """Batch and request of an active edit, by id or a unique beginning of it; the newest that was written.

        Raises:
            RequestError: If none or several fit.
        """
        index = self.edits
        fits = index.matching(edit_id)
        if len(fits) != 1:
            found = ", ".join(fits[:5]) or "none"
            raise RequestError(
                f"edit {edit_id!r} fits {len(fits)} active edits ({found}); `nmke log` lists the ids"
            )
        places = index.places(fits[0])
        place = next((p for p in reversed(places) if p.status != "known"), places[-1])
        return place.seq, self.request(place.seq, place.position)

    def failed(self, edit_id: str) -> EditRequest:
        """The active edit of that id, which did not take.

        Raises:
            RequestError: If it is not active or did not fail.
        """
        _, request = self.find(edit_id)
        place = self.edits.places(request.id)[-1]
        if place.status != "failed":
            raise RequestError(
                f"edit {request.id!r} is {place.status!r}; only edits that failed can be retried: undo it first"
            )
        return request

    def search(
        self, text: str = "", status: Status | None = None, *, limit: int = 100, before: Row | None = None
    ) -> list[tuple[Row, EditRecord]]:
        """Edits, newest first, taken-back ones too.

        Args:
            text: What prompt, subject, answer or id must hold; upper and lower case are the same in ASCII.
            status: Only these.
            limit: At most so many.
            before: Only those that stand before this place, as the last answer gave it.

        Returns:
            Place (batch, position) and record of each.
        """
        pattern = "%" + re.sub("[!%_]", r"!\g<0>", text) + "%"
        query = f"""
            SELECT seq, position, status, request, detail FROM edits
            WHERE {_SEARCHED} LIKE :pattern ESCAPE '!' AND status = coalesce(:status, status)
            AND (seq, position) < (:seq, :position) ORDER BY seq DESC, position DESC LIMIT :limit"""
        seq, position = before or (2**62, 0)
        values = {"pattern": pattern, "status": status, "seq": seq, "position": position, "limit": limit}
        return self._placed(query, values)

    def named(self, edit_id: str) -> list[tuple[Row, EditRecord]]:
        """Every edit of exactly that id, newest first, taken-back ones too."""
        query = """
            SELECT seq, position, status, request, detail FROM edits WHERE id = :id
            ORDER BY seq DESC, position DESC"""
        return self._placed(query, {"id": edit_id})

    def _placed(self, query: str, values: Mapping[str, Any]) -> list[tuple[Row, EditRecord]]:
        with self._reading() as db:
            return [
                ((seq, place), EditRecord(request_of(json.loads(request)), found, json.loads(detail)))
                for seq, place, found, request, detail in db.execute(query, values).fetchall()
            ]

    def file_names(self) -> set[str]:
        """Every file that an event names."""
        with self._reading() as db:
            return {name for (files,) in db.execute("SELECT files FROM events") for name in json.loads(files)}

    def verify_chain(self) -> int:
        """Recompute every row's hash.

        Returns:
            How many events were checked.

        Raises:
            VerifyError: At the first row that does not fit.
        """
        count, rows = 0, 0
        try:
            with self._reading() as db:
                found = db.execute("PRAGMA integrity_check").fetchone()[0]
                if found != "ok":
                    raise LedgerError(
                        f"ledger {str(self._path)!r} is damaged ({found}); restore it from a backup"
                    )
                previous = ""
                for row in db.execute("SELECT * FROM events ORDER BY seq"):
                    count += 1
                    previous, edits = self._checked_chain(row, count, previous)
                    rows += edits
                if rows != db.execute("SELECT count(*) FROM edits").fetchone()[0]:
                    raise self._mismatch("a request")
        except VerifyError:
            raise
        except LedgerError as error:
            raise VerifyError(str(error)) from error
        return count

    def _checked_chain(self, row: tuple[Any, ...], number: int, previous: str) -> tuple[str, int]:
        """The row's recomputed hash, and how many requests it covers."""
        seq, name, *values, chain = row
        query = "SELECT * FROM edits WHERE seq = ? ORDER BY position"
        edits = self._db.execute(query, (seq,)).fetchall()
        found = chain_hash(seq, tuple(values), edits)
        if seq != number or values[-1] != previous or found != chain or name != event_name(chain):
            raise self._mismatch(f"event {seq}")
        return found, len(edits)

    def _mismatch(self, what: str) -> VerifyError:
        return VerifyError(
            f"{what} of {str(self._path)!r} was changed after it was written: its hash does not fit; "
            "restore the run from a backup"
        )


def _damaged(error: Exception) -> type[LedgerError]:
    """Damage is a mismatch; a locked or unreadable file is not."""
    return LedgerError if isinstance(error, sqlite3.OperationalError) else VerifyError


def _refuse_foreign(db: sqlite3.Connection) -> None:
    """Raise if the file holds tables, views or triggers that are not a ledger's: they could do anything."""
    query = "SELECT type, name, sql FROM sqlite_master WHERE sql IS NOT NULL"
    with closing(sqlite3.connect(":memory:")) as own:
        own.executescript(_SCHEMA)
        expected = set(own.execute(query).fetchall())
    strange = set(db.execute(query).fetchall()) - expected
    if strange:
        kind, name, _ = min(strange)
        raise sqlite3.DatabaseError(f"its {kind} {name[:60]!r} is no part of a ledger")
