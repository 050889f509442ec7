"""Processes that work together as `torchrun` would start them, forked so that nothing is imported again."""

import os
import signal
import socket
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from tests.killing import fork

Work = Callable[[int], int]


def launch(size: int, work: Work, logs: Path, seconds: float = 120.0) -> list[int | None]:
    """Run `work(rank)` in `size` processes that find each other, output going to `logs`.

    Returns:
        Exit codes by rank, None for a process that had to be killed at the end of its time.
    """
    port = _free_port()
    pids = [_start(rank, size, port, work, logs) for rank in range(size)]
    until, codes = time.monotonic() + seconds, [None] * size
    while None in codes and time.monotonic() < until:
        for rank, pid in enumerate(pids):
            if codes[rank] is None and (found := os.waitpid(pid, os.WNOHANG))[0]:
                codes[rank] = os.waitstatus_to_exitcode(found[1])
        time.sleep(0.01)
        if codes[0] is not None:  # as torchrun does, the others are given a moment
            until = min(until, time.monotonic() + 5.0)
    for pid, code in zip(pids, codes, strict=True):
        if code is None:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    return codes


def _start(rank: int, size: int, port: int, work: Work, logs: Path) -> int:
    def child(_writing: int) -> None:
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(size),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
        for stream, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(logs / f"{rank}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
        code = 99
        try:
            code = work(rank)
        except BaseException:
            os.write(2, traceback.format_exc().encode())
        finally:
            os._exit(code)

    pid, reading = fork(child)
    os.close(reading)
    return pid


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
