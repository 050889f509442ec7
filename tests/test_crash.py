"""Runs that are killed, run out of disk, or meet another process: the state before a batch or after it, never between.

The killed runs are real processes, forked from this one so that they need not import torch again. They load
the model from its folder, open the run and edit; SIGKILL takes them at random moments or at chosen writes.
"""

import errno
import json
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests import runs, tiny
from tests.killing import die_at, fork, killed

from nmke import batch_file
from nmke.errors import LedgerError, VerifyError
from nmke.ledger import Ledger
from nmke.models import cache
from nmke.models.load import EditableModel, load_model
from nmke.provenance import FILE
from nmke.run_folder import RunFolder
from nmke.session import EditSession
from nmke.stats.store import StatsStore

FACTS = runs.facts(12)
SETTINGS = {"batch_size": 1, "steps": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tiny model."""
    return tiny.save_tiny(tmp_path_factory.mktemp("model") / "tiny", runs.loud_llama)


@pytest.fixture(scope="module")
def base(folder: Path) -> EditableModel:
    """The same model in this process; copy it."""
    return load_model(str(folder))


@pytest.fixture(scope="module")
def store() -> StatsStore:
    return runs.shared_store()


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory, folder: Path, store: StatsStore) -> list[str]:
    """Content hashes of a run that nobody stops: of the base and after every batch."""
    with begin(folder, tmp_path_factory.mktemp("unbroken") / "run", store) as session:
        return [session.content_hash, *(r.event.hash_after for r in runs.edit_all(session, FACTS))]


def begin(source: Path | EditableModel, run: Path, store: StatsStore) -> EditSession:
    given = source if isinstance(source, EditableModel) else str(source)
    return EditSession.open(given, run, config=runs.config(**SETTINGS), store=store)


def edit_in_child(folder: Path, run: Path, store: StatsStore) -> Callable[[int], None]:
    def work(writing: int) -> None:
        with begin(folder, run, store) as session:
            os.write(writing, b"opened")
            runs.edit_all(session, FACTS, resume=True)

    return work


def kill_at_random(
    folder: Path, run: Path, store: StatsStore, random_state: random.Random, at_once: bool
) -> bool:
    """Start or go on with a run and kill it: within its first moments, or while it edits."""
    pid, reading = fork(edit_in_child(folder, run, store))
    if not at_once:
        os.read(reading, 6)
    time.sleep(random_state.uniform(0.0, 0.4))
    os.kill(pid, signal.SIGKILL)
    return killed(pid, reading)


def check_after_kill(base: EditableModel, run: Path, store: StatsStore, unbroken: list[str]) -> int:
    """The run is at a batch boundary and verifies; how many batches it holds."""
    if not RunFolder.exists(run):
        return 0
    with begin(runs.copied(base), run, store) as session:
        session.verify()
        done = len(session.log())
        assert session.content_hash == unbroken[done]
        return done


def finish(base: EditableModel, run: Path, store: StatsStore, unbroken: list[str]) -> None:
    with begin(runs.copied(base), run, store) as session:
        runs.edit_all(session, FACTS, resume=True)
        assert [event.hash_after for event in session.log()] == unbroken[1:]
        session.verify()
        no_leftovers(session)


def no_leftovers(session: EditSession) -> None:
    """Nothing lies in the run that the ledger does not name."""
    named = session.ledger.file_names()
    last = session.log()[-1].files
    for part in (session.folder.edits, session.folder.head):
        for path in part.iterdir():
            assert f"{part.name}/{path.name}" in (named if part.name == "edits" else last)


def kill_many(moments: int, seed: int, *fixtures: object) -> None:
    folder, base, store, unbroken, tmp_path = fixtures
    random_state, kills, number = random.Random(seed), 0, 0
    while kills < moments:
        number += 1
        run = tmp_path / f"run{number}"
        for _ in range(6):
            at_once = random_state.random() < 0.2
            kills += kill_at_random(folder, run, store, random_state, at_once)
            if check_after_kill(base, run, store, unbroken) == len(FACTS) or kills == moments:
                break
        finish(base, run, store, unbroken)


def test_random_kills_leave_batch_boundaries(folder, base, store, unbroken, tmp_path):
    kill_many(2, 1, folder, base, store, unbroken, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 6))
def test_many_random_kills_leave_batch_boundaries(seed, folder, base, store, unbroken, tmp_path):
    kill_many(15, seed, folder, base, store, unbroken, tmp_path)


# ---------------------------------------------------------------- killed at chosen writes


def die_while_saving(point: int, base, store, unbroken, tmp_path, monkeypatch) -> bool:
    """Kill the third batch at one write; whether the process got that far."""
    run = tmp_path / f"at{point}"
    with begin(runs.copied(base), run, store) as session:
        runs.edit_all(session, FACTS[:2])

    def work(_: int) -> None:
        with begin(runs.copied(base), run, store) as session:
            session._journal.begin_writing(session._closing)
            die_at(point, monkeypatch)
            session.edit_batch(FACTS[2:3])

    if not killed(*fork(work)):
        return False
    assert check_after_kill(base, run, store, unbroken) in (2, 3)
    with begin(runs.copied(base), run, store) as session:
        runs.edit_all(session, FACTS[:4], resume=True)
        assert session.content_hash == unbroken[4]
        session.verify()
        no_leftovers(session)
    return True


@pytest.mark.parametrize("point", [9, 20])
def test_a_kill_between_the_files_and_the_ledger_leaves_nothing(
    point, base, store, unbroken, tmp_path, monkeypatch
):
    assert die_while_saving(point, base, store, unbroken, tmp_path, monkeypatch)


def test_a_kill_between_the_ledger_and_its_summary_loses_nothing(
    base, store, unbroken, tmp_path, monkeypatch
):
    run = tmp_path / "run"
    with begin(runs.copied(base), run, store) as session:
        runs.edit_all(session, FACTS[:2])
    before = json.loads((run / FILE).read_text())

    def work(_: int) -> None:
        with begin(runs.copied(base), run, store) as session:
            monkeypatch.setattr(
                "nmke.journal.write_provenance", lambda *_: os.kill(os.getpid(), signal.SIGKILL)
            )
            session.edit_batch(FACTS[2:3])

    assert killed(*fork(work))
    assert json.loads((run / FILE).read_text()) == before, "the ledger holds the batch, the summary does not"
    assert check_after_kill(base, run, store, unbroken) == 3
    (run / FILE).write_text(json.dumps({**before, "content_hash": unbroken[0]}))
    with pytest.raises(VerifyError, match="differ in content_hash"):
        check_after_kill(base, run, store, unbroken)
    (run / FILE).write_text(json.dumps({**before, "events": 4}))
    with pytest.raises(VerifyError, match="differ in events"):
        check_after_kill(base, run, store, unbroken)
    with begin(runs.copied(base), run, store) as session:
        session._journal.begin_writing(session._closing)
        assert json.loads((run / FILE).read_text())["content_hash"] == unbroken[3]
        session.verify()


@pytest.mark.slow
def test_a_kill_at_every_single_write(base, store, unbroken, tmp_path, monkeypatch):
    point = 1
    while die_while_saving(point, base, store, unbroken, tmp_path, monkeypatch):
        point += 1
    assert point > 25, "files, renames, syncs, statements and removals were all struck"


# ---------------------------------------------------------------- the disk is full


def full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def fail_second(plain: Callable[..., object]) -> Callable[..., object]:
    calls: list[int] = []

    def call(*arguments: object, **more: object) -> object:
        calls.append(1)
        return full() if len(calls) == 2 else plain(*arguments, **more)

    return call


def full_ledger(session: EditSession, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ledger cannot grow by a page; SQLite itself then says that the disk is full."""
    pages = session.ledger._db.execute("PRAGMA page_count").fetchone()[0]
    session.ledger._db.execute(f"PRAGMA max_page_count={pages}")
    monkeypatch.setattr("nmke.batches.versions", lambda: {"padding": "x" * 20_000})


FULL = {
    "batch file": lambda session, patch: patch.setattr(batch_file, "save_file", full),
    "head file": lambda session, patch: patch.setattr(
        batch_file, "save_file", fail_second(batch_file.save_file)
    ),
    "sync of the batch file": lambda session, patch: patch.setattr(cache.os, "fsync", full),
    "ledger": full_ledger,
}


@pytest.mark.parametrize("where", FULL)
def test_a_full_disk_leaves_everything_as_it_was(where, base, store, unbroken, tmp_path, monkeypatch):
    with begin(runs.copied(base), tmp_path / "run", store) as session:
        runs.edit_all(session, FACTS[:2])
        before = runs.bits(session.model)
        with monkeypatch.context() as patched:
            FULL[where](session, patched)
            with pytest.raises(
                LedgerError, match=r"could not be written.*nothing was changed: free disk space"
            ):
                session.edit_batch(FACTS[2:3])
        assert runs.bits(session.model) == before and len(session.log()) == 2
        no_leftovers(session)
        session.verify()
        session.ledger._db.execute("PRAGMA max_page_count=1000000")
        runs.edit_all(session, FACTS[2:4])
        assert session.content_hash == unbroken[4]


@pytest.mark.parametrize("where", ["batch file", "ledger"])
def test_an_undo_on_a_full_disk_changes_nothing(where, base, store, unbroken, tmp_path, monkeypatch):
    with begin(runs.copied(base), tmp_path / "run", store) as session:
        runs.edit_all(session, FACTS[:3])
        before = runs.bits(session.model)
        with monkeypatch.context() as patched:
            FULL[where](session, patched)
            if where == "ledger":
                patched.setattr(Ledger, "append", full)
            with pytest.raises((LedgerError, OSError), match="No space left"):
                session.undo()
        assert runs.bits(session.model) == before
        assert session.undo().hash_after == unbroken[2]
        session.verify()


def test_an_interrupt_just_after_the_commit_keeps_the_batch(base, store, unbroken, tmp_path, monkeypatch):
    with begin(runs.copied(base), tmp_path / "run", store) as session:
        append = session.ledger.append

        def interrupted(*arguments: object, **more: object) -> None:
            append(*arguments, **more)
            raise KeyboardInterrupt

        with monkeypatch.context() as patched:
            patched.setattr(session.ledger, "append", interrupted)
            with pytest.raises(KeyboardInterrupt):
                session.edit_batch(FACTS[:1])
        assert session.content_hash == unbroken[1]
        runs.edit_all(session, FACTS[1:3])
        assert session.content_hash == unbroken[3]
        session.verify()


# ---------------------------------------------------------------- two processes


@pytest.fixture
def writer(base: EditableModel, store: StatsStore, tmp_path: Path) -> Iterator[int]:
    """Another process that holds the run at `tmp_path / "run"` open for writing."""

    def work(writing: int) -> None:
        session = begin(runs.copied(base), tmp_path / "run", store)
        session.edit_batch(FACTS[:1])
        os.write(writing, b"edited")
        time.sleep(600)

    pid, reading = fork(work)
    os.read(reading, 6)
    yield pid
    os.kill(pid, signal.SIGKILL)
    killed(pid, reading)


def test_a_second_process_is_refused_with_the_pid_of_the_first(writer, base, store, unbroken, tmp_path):
    session = begin(runs.copied(base), tmp_path / "run", store)
    for write in (lambda: session.edit_batch(FACTS[1:2]), session.undo, lambda: session.revert("e000")):
        with pytest.raises(LedgerError, match=rf"is being written by process {writer}; wait"):
            write()
    with pytest.raises(LedgerError, match=f"process {writer}"):
        EditSession.open(runs.copied(base), tmp_path / "run", force=True)
    assert session.content_hash == unbroken[1] and len(session.log()) == 1, "reading is free"
    os.kill(writer, signal.SIGKILL)
    for _ in range(1000):
        try:
            session.edit_batch(FACTS[1:2])
            break
        except LedgerError:
            time.sleep(0.01)
    assert session.content_hash == unbroken[2]


def test_a_session_follows_what_another_wrote_since_it_was_opened(base, store, unbroken, tmp_path):
    with begin(runs.copied(base), tmp_path / "run", store) as early:
        with begin(runs.copied(base), tmp_path / "run", store) as other:
            runs.edit_all(other, FACTS[:2])
        assert early.content_hash == unbroken[0]
        early.edit_batch(FACTS[2:3])
        assert early.content_hash == unbroken[3]
        early.verify()


def test_a_run_without_its_ledger_is_refused_and_nothing_is_deleted(base, store, tmp_path):
    with begin(runs.copied(base), tmp_path / "run", store) as session:
        runs.edit_all(session, FACTS[:3])
    for path in (tmp_path / "run").glob("ledger.sqlite*"):
        path.unlink()
    files = sorted((tmp_path / "run" / "edits").iterdir())
    with pytest.raises(VerifyError, match="has a file of event 3, its ledger ends at 0"):
        begin(runs.copied(base), tmp_path / "run", store)
    assert sorted((tmp_path / "run" / "edits").iterdir()) == files
