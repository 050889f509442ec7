"""One of several processes that `torchrun` started: rank 0 runs the command, the others help it.

`torchrun --nproc_per_node N -m nmke edit ...`: see `nmke.models.ranks` for what is shared.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

from nmke.errors import ConfigError


@contextmanager
def among_ranks() -> Iterator[bool]:
    """Join the other ranks, if the environment says that there are any.

    Yields:
        True in a process that has done its part by now and has no command to run.

    Raises:
        ConfigError: If the environment is not what `torchrun` sets.
        RankError: If rank 0, or another rank, is gone.
    """
    size = _number("WORLD_SIZE", 1)
    if size == 1:
        yield False
        return
    rank = _number("RANK", -1)
    if not 0 <= rank < size:
        raise ConfigError(
            f"WORLD_SIZE is {size} and RANK is {os.environ.get('RANK')!r}; start the processes with torchrun, "
            "or unset WORLD_SIZE"
        )
    from nmke.models.ranks import follow, joined

    with joined(rank, size):
        if rank:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # rank 0 finishes its batch and then ends the others
            follow()
        yield rank > 0


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    try:
        return int(text)
    except ValueError as error:
        raise ConfigError(f"{name} is {text!r}, which is no number; torchrun sets it, or unset it") from error
