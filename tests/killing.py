"""Processes that are forked to be killed: at a moment chosen from outside, or at their n-th write."""

import os
import signal
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from nmke import batch_file
from nmke.ledger import Ledger


def fork(work: Callable[[int], object]) -> tuple[int, int]:
    """Run `work` in a process of its own; it gets a pipe's writing end. Returns its pid and the reading end."""
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # from 3.12 on: pytest-xdist has threads
        pid = os.fork()
    if pid:
        os.close(writing)
        return pid, reading
    code = 1
    try:
        work(writing)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def killed(pid: int, reading: int) -> bool:
    """Wait for the process; whether a signal ended it."""
    _, status = os.waitpid(pid, 0)
    os.close(reading)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def killer(point: int) -> Callable[..., None]:
    """Kills this process at its n-th call."""
    count = 0

    def call() -> None:
        nonlocal count
        count += 1
        if count == point:
            os.kill(os.getpid(), signal.SIGKILL)

    return call


def die_at(point: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGKILL around the n-th of: every file written, synced, renamed and removed, every statement of the ledger."""
    strike_at_writes(killer(point), monkeypatch)


def strike_at_writes(strike: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Call `strike` before and after each write; see `die_at`."""

    def around(owner: object, name: str) -> None:
        plain = getattr(owner, name)

        def struck(*arguments: object, **more: object) -> object:
            strike()
            result = plain(*arguments, **more)
            strike()
            return result

        monkeypatch.setattr(owner, name, struck)

    around(batch_file, "save_file")
    around(os, "fsync")
    around(Path, "replace")
    around(Path, "unlink")
    append = Ledger.append

    class Statements:
        def __init__(self, db: object) -> None:
            self._db = db

        def execute(self, *arguments: object) -> object:
            strike()
            return self._db.execute(*arguments)

        def __getattr__(self, name: str) -> object:
            strike()
            return getattr(self._db, name)

    def appended(self: Ledger, *arguments: object, **more: object) -> object:
        plain, self._db = self._db, Statements(self._db)
        try:
            return append(self, *arguments, **more)
        finally:
            self._db = plain

    monkeypatch.setattr(Ledger, "append", appended)
