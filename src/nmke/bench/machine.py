"""What a measurement was taken on, and the largest memory while it was taken."""

from __future__ import annotations

import os
import resource
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def machine() -> dict[str, Any]:
    """Processor, cores, threads used, load and accelerator."""
    import torch

    from nmke.environment import processor

    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": [round(value, 2) for value in os.getloadavg()],
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def peak_rss_mb() -> float:
    """Largest memory of this process so far, in units of 2^20 bytes; since a reset where there was one."""
    if _STATUS.exists():
        lines = _STATUS.read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 2**10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


class PeakMemory:
    """The largest memory since `reset`: of the accelerator where the model is on one, else of this process.

    Where the system cannot reset a process's peak, it is the largest since the process began.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.reset()

    @property
    def of(self) -> Literal["process", "device"]:
        """Whose memory is measured."""
        return "device" if self._device.type == "cuda" else "process"

    def reset(self) -> None:
        """Begin anew."""
        if self.of == "device":
            import torch

            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            with suppress(OSError):  # not Linux, or not allowed
                _CLEAR.write_text("5")  # documented in proc(5): resets VmHWM to the memory in use now

    def megabytes(self) -> float:
        """The peak, in units of 2^20 bytes."""
        if self.of == "process":
            return peak_rss_mb()
        import torch

        return torch.cuda.max_memory_allocated(self._device) / 2**20
