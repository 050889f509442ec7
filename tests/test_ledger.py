"""The record: rows stay as they were written, any change shows, and the index of active edits follows."""

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from nmke.active_edits import ActiveEdits, Place
from nmke.errors import LedgerError, VerifyError
from nmke.events import EditRecord, Event
from nmke.ledger import Ledger
from nmke.types import EditRequest, Neighbor

REQUEST = EditRequest(
    "The capital of {} is",
    "Peru",
    "Ōsaka",
    relation="capital",
    paraphrases=("Peru's capital is",),
    neighborhood=(Neighbor("The capital of Chile is", "Santiago"), Neighbor("Lima is in")),
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.sqlite"


@pytest.fixture
def ledger(path: Path) -> Iterator[Ledger]:
    opened = Ledger(path)
    yield opened
    opened.close()


def request(name: str, subject: str | None = None) -> EditRequest:
    return EditRequest("The capital of {} is", subject or name, "Lyon", id=name)


def add(ledger: Ledger, *records: EditRecord, kind: str = "edit", **body: object) -> Event:
    number = ledger.last_seq() + 1
    return ledger.append(
        kind,
        created="2026-01-01T00:00:00+00:00",
        body={"config": {"seed": 1}, **body},
        files={f"edits/{number:06d}.safetensors": "f" * 64},
        hash_before=f"h{number - 1}",
        hash_after=f"h{number}",
        edits=records,
    )


def batch(*names: str, status: str = "written") -> list[EditRecord]:
    return [EditRecord(request(name), status, {"loss": 0.25}) for name in names]


def test_what_was_appended_is_read_back_whole(ledger, path):
    record = EditRecord(REQUEST, "failed", {"reason": "ähnlich", "loss": 0.1})
    event = add(ledger, record, *batch("a"))
    assert event.edits == (record, *batch("a")) and event.seq == 1 and event.id.startswith("b")
    again = Ledger(path)
    assert again.events() == [event] == [again.event(1)]
    assert again.request(1, 0) == REQUEST
    assert again.last_seq() == 1 and again.last().chain == event.chain
    again.close()


def test_an_empty_ledger_says_so(ledger):
    assert ledger.last() is None and ledger.last_seq() == 0 and ledger.active() == []
    assert ledger.verify_chain() == 0
    with pytest.raises(LedgerError, match="there is no event 3"):
        ledger.event(3)


@pytest.mark.parametrize("table", ["events", "edits"])
@pytest.mark.parametrize("statement", ["UPDATE {} SET seq = seq + 1", "DELETE FROM {}"])
def test_rows_can_be_neither_changed_nor_deleted(ledger, path, table, statement):
    add(ledger, *batch("a"))
    with (
        sqlite3.connect(path) as other,
        pytest.raises(sqlite3.IntegrityError, match="append-only"),
    ):
        other.execute(statement.format(table))
    other.close()
    assert ledger.verify_chain() == 1


COLUMNS = {
    "events": ("id", "kind", "created", "body", "files", "hash_before", "hash_after", "previous", "chain"),
    "edits": ("position", "id", "fact_key", "status", "request", "detail"),
}


@pytest.mark.parametrize(("table", "column"), [(t, c) for t, columns in COLUMNS.items() for c in columns])
def test_a_changed_value_anywhere_shows(ledger, path, table, column):
    add(ledger, *batch("a", "b"))
    add(ledger, *batch("c"))
    assert ledger.verify_chain() == 2
    tamper(path, f"UPDATE {table} SET {column} = {column} || 'x' WHERE seq = 1 AND rowid = 1")
    with pytest.raises(VerifyError, match=r"event 1 of .* was changed after it was written") as found:
        ledger.verify_chain()
    assert found.value.exit_code == 7


@pytest.mark.parametrize(
    "statement",
    [
        "DELETE FROM events WHERE seq = 1",
        "DELETE FROM edits WHERE seq = 2",
        "UPDATE events SET seq = 9 WHERE seq = 2",
        "INSERT INTO edits VALUES (9, 0, 'x', 'x', 'written', '{}', '{}')",
    ],
)
def test_rows_that_are_missing_or_too_many_show(ledger, path, statement):
    add(ledger, *batch("a"))
    add(ledger, *batch("b"))
    tamper(path, statement)
    with pytest.raises(VerifyError, match="was changed after it was written"):
        ledger.verify_chain()


def tamper(path: Path, statement: str) -> None:
    """Change the file as someone would who knows SQLite."""
    with sqlite3.connect(path) as other:
        for (name,) in other.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'").fetchall():
            other.execute(f"DROP TRIGGER {name}")
        other.execute(statement)
    other.close()


def test_every_flipped_byte_of_the_rows_shows(path):
    ledger = Ledger(path)
    add(ledger, *batch("a"))
    ledger.close()
    content = path.read_bytes()
    texts = [b"h0", b"2026-01-01", b'"seed":1', b'"loss":0.25', b"the capital of {} is", b"written", b"Lyon"]
    for text in texts:
        place = content.rindex(text)
        for offset in (place, place + len(text) - 1):
            path.write_bytes(content[:offset] + bytes([content[offset] ^ 1]) + content[offset + 1 :])
            with pytest.raises(VerifyError):
                damaged = Ledger(path)
                try:
                    damaged.verify_chain()
                finally:
                    damaged.close()


def test_a_file_that_is_no_ledger_is_damage(path):
    path.write_bytes(b"something else entirely" * 100)
    with pytest.raises(VerifyError, match=r"cannot be opened \(file is not a database"):
        Ledger(path)


def test_text_that_is_no_json_is_damage(ledger, path):
    add(ledger, *batch("a"))
    tamper(path, "UPDATE events SET body = '{' WHERE seq = 1")
    with pytest.raises(VerifyError, match="is damaged"):
        ledger.events()


def test_a_failed_append_leaves_nothing(ledger, path):
    add(ledger, *batch("a"))
    pages = ledger._db.execute("PRAGMA page_count").fetchone()[0]
    ledger._db.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(LedgerError, match=r"event 2 could not be written .*full.*nothing was changed"):
        add(ledger, *batch("b"), padding="x" * 50_000)
    assert ledger.last_seq() == 1 and ledger.verify_chain() == 1 and ledger.active() == [1]
    ledger._db.execute("PRAGMA max_page_count = 100000")
    assert add(ledger, *batch("b")).seq == 2


def test_an_append_whose_rollback_fails_too_is_rolled_back_before_the_next_use(ledger):
    add(ledger, *batch("a"))

    def neither_commit_nor_rollback(action: int, what: str | None, *_: object) -> int:
        refused = action == sqlite3.SQLITE_TRANSACTION and what in ("COMMIT", "ROLLBACK")
        return sqlite3.SQLITE_DENY if refused else sqlite3.SQLITE_OK

    ledger._db.set_authorizer(neither_commit_nor_rollback)
    with pytest.raises(LedgerError, match=r"event 2 could not be written .*not authorized"):
        add(ledger, *batch("b"))
    assert ledger._db.in_transaction
    with pytest.raises(LedgerError, match="not authorized"):
        ledger.last_seq()
    ledger._db.set_authorizer(None)
    assert ledger.last_seq() == 1 and ledger.verify_chain() == 1 and ledger.active() == [1]
    assert add(ledger, *batch("c")).seq == 2


# ---------------------------------------------------------------- the index of active edits


def test_active_batches_follow_undo_and_revert(ledger, path):
    for names in ("ab", "cd", "ef"):
        add(ledger, *batch(*names))
    add(ledger, kind="undo", undone=[3])
    assert ledger.active() == [1, 2]
    add(ledger, *batch("e"))
    add(ledger, kind="revert", undone=[2, 5], reverted="c", replay=[["d"], ["e"]])
    assert ledger.active() == [1] and set(ledger.known_ids([1])) == {"a", "b"}
    index = ledger.edits
    assert "a" in index and "e" not in index
    assert (
        index.replay is not None and index.replay.left == (("d",), ("e",)) and index.replay.undone == (2, 5)
    )
    add(ledger, *batch("d"))
    assert ledger.edits.replay.left == (("e",),)
    add(ledger, *batch("e"))
    assert ledger.edits.replay is None and ledger.active() == [1, 7, 8]
    other = Ledger(path)
    assert other.edits == ledger.edits, "an index built later is the same"
    other.close()


def test_the_index_sees_what_another_connection_appends(ledger, path):
    other = Ledger(path)
    assert ledger.active() == []
    add(other, *batch("a"))
    assert ledger.active() == [1] and "a" in ledger.edits
    other.close()


def test_each_event_is_read_once(ledger):
    seen: list[str] = []
    for number in range(5):
        add(ledger, *batch(f"n{number}"))
        assert len(ledger.active()) == number + 1
    ledger._db.set_trace_callback(seen.append)
    for _ in range(3):
        assert len(ledger.edits.batches) == 5
    assert len(seen) == 3, "one look for newer events each"


def test_holders_know_the_newest_written_edit_of_a_fact(ledger):
    add(ledger, EditRecord(request("first", "Peru"), "written"))
    add(ledger, EditRecord(request("second", "Peru"), "failed"), *batch("other"))
    add(ledger, EditRecord(request("third", "PERU"), "known"))
    index = ledger.edits
    fact = request("x", "peru").fact_key
    assert index.holder(fact).id == "second" and index.holder(fact, before=2).id == "first"
    assert index.holder(fact, before=1) is None and index.holder("nothing") is None
    assert sorted(place.id for place in index.holders()) == ["other", "second"]
    assert [place.id for place in index.written(3)] == [] and index.batch(3)[0].status == "known"
    add(ledger, kind="undo", undone=[2, 3])
    assert ledger.edits.holder(fact).id == "first"


def test_ids_are_found_by_their_beginning():
    index = ActiveEdits()
    index.add(1, [(0, "ab", "f", "failed"), (1, "abc", "g", "written")])
    index.add(2, [(0, "ab", "f", "written")])
    assert index.matching("ab") == ["ab"] and sorted(index.matching("a")) == ["ab", "abc"]
    assert index.places("ab") == [Place(1, 0, "ab", "f", "failed"), Place(2, 0, "ab", "f", "written")]
    assert index.places("nobody") == () and index.count() == 2
    index.take_back(3, {"undone": [2]})
    assert index.places("ab") == [Place(1, 0, "ab", "f", "failed")] and index.seen == 3


def test_edits_are_searched_newest_first_in_pages(tmp_path):
    ledger = Ledger(tmp_path / "ledger.sqlite")
    facts = [("France", "Lyon"), ("Peru", "50%_off"), ("France", "Nice")]
    for number, (subject, target) in enumerate(facts):
        request = EditRequest("The capital of {} is", subject, target, id=f"e{number}")
        status = "failed" if number == 1 else "written"
        ledger.append(
            "edit",
            created="now",
            body={},
            files={},
            hash_before="",
            hash_after="",
            edits=[EditRecord(request, status)],
        )

    def found(*arguments, **more):
        return [record.request.id for _, record in ledger.search(*arguments, **more)]

    assert found() == ["e2", "e1", "e0"]
    assert found("OF FRANCE is") == ["e2", "e0"] and found("nice") == ["e2"] and found("e1") == ["e1"]
    assert found("%_") == ["e1"] and found("prompt") == [] and found("{}") == []
    assert found(status="failed") == ["e1"]
    place, _ = ledger.search(limit=2)[-1]
    assert place == (2, 0) and found(before=place) == ["e0"]
    ledger.close()
