"""What this machine can do at most, measured, and how far a stage stays from it.

A stage needs so many operations and must move so many bytes; the larger of operations over measured peak and bytes
over measured bandwidth is its floor. Peaks are those of torch's own matrix product and copy at sizes that do not fit
a cache, so that a share of 1 means: as fast as the best this library stack does here.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Peaks:
    """Measured best of one device.

    Args:
        operations: By type, floating-point operations per second of a matrix product.
        bandwidth: Bytes per second read and written by a copy.
    """

    operations: dict[str, float]
    bandwidth: float


@dataclass
class Stage:
    """One measurement.

    Args:
        name: What was run.
        setting: Sizes and the like.
        seconds: Median over `repeats` runs.
        spread: Fastest and slowest run, seconds.
        repeats: How many.
        operations: Floating-point operations that it needs.
        bytes: That it has to move at least.
        dtype: Type of its products.
        peak_mb: Most memory the device held, None on a CPU.
        detail: Further numbers.
    """

    name: str
    setting: dict[str, Any]
    seconds: float
    spread: tuple[float, float]
    repeats: int
    operations: float
    bytes: float
    dtype: str
    peak_mb: float | None = None
    detail: dict[str, Any] = field(default_factory=dict)

    def record(self, peaks: Peaks) -> dict[str, Any]:
        """Its numbers beside its floor."""
        floor = max(self.operations / peaks.operations[self.dtype], self.bytes / peaks.bandwidth)
        return {
            **asdict(self),
            "floor_seconds": floor,
            "times_floor": self.seconds / floor if floor else None,
        }


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(run: Callable[[], Any], device: torch.device, repeats: int, warm: int = 1) -> list[float]:
    """Seconds of each of `repeats` runs, after `warm` that are not counted."""
    for _ in range(warm):
        run()
    found = []
    for _ in range(repeats):
        synchronize(device)
        begun = time.perf_counter()
        run()
        synchronize(device)
        found.append(time.perf_counter() - begun)
    return found


def stage(
    name: str,
    run: Callable[[], Any],
    device: torch.device,
    *,
    operations: float,
    dtype: torch.dtype,
    bytes: float = 0.0,
    repeats: int = 3,
    warm: int = 1,
    setting: dict[str, Any] | None = None,
) -> Stage:
    """Measure one stage."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    seconds = timed(run, device, repeats, warm)
    peak = torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else None
    name_of_type = str(dtype).removeprefix("torch.")
    return Stage(
        name, setting or {}, statistics.median(seconds), (min(seconds), max(seconds)), repeats, float(operations),
        float(bytes), name_of_type, peak,
    )  # fmt: skip


def measure_peaks(device: torch.device, size: int | None = None) -> Peaks:
    """Best of several products of [size, size] matrices in each type, and of a copy of at least 256 MB on a GPU."""
    size = size or (8192 if device.type == "cuda" else 1536)
    operations = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        side = size // 2 if dtype == torch.float64 and device.type == "cuda" else size
        left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        best = min(timed(lambda left=left, right=right: left @ right, device, 5, 2))
        operations[str(dtype).removeprefix("torch.")] = 2 * side**3 / best
    block = torch.empty(1 << (28 if device.type == "cuda" else 24), dtype=torch.float32, device=device)
    other = torch.empty_like(block)
    best = min(timed(lambda: other.copy_(block), device, 5, 2))
    return Peaks(operations, 2 * block.numel() * 4 / best)
