"""What computes: versions, processor, threads, accelerator; equal bits are promised only where all of it is equal."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import nmke

PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy")
DETERMINISTIC = "NMKE_DETERMINISTIC"  # also on CUDA, where it costs speed


def environment(device: torch.device) -> dict[str, Any]:
    """Everything outside the run that its bits depend on; no name, path or address of the machine.

    Args:
        device: Where the model is.
    """
    on_cuda = device.type == "cuda"
    return {
        "packages": _packages(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
        "device": torch.cuda.get_device_name(device) if on_cuda else device.type,
        "deterministic": not on_cuda or wants_determinism(),
    }


@cache
def processor() -> str:
    """Name of the processor, as the system gives it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        if lines:
            return lines[0].split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def wants_determinism() -> bool:
    """Whether deterministic algorithms were asked for on CUDA too."""
    return os.environ.get(DETERMINISTIC) == "1" or torch.are_deterministic_algorithms_enabled()


@contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """Torch's deterministic algorithms inside the `with`: always on the CPU, on CUDA when asked for.

    What has no deterministic form warns there and runs. The process's own setting is restored afterwards.
    """
    if device.type == "cuda" and not wants_determinism():
        yield
        return
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch refuses cuBLAS without it
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    memory: Any = torch.utils.deterministic  # its property is not in the stubs
    filled = memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    memory.fill_uninitialized_memory = False  # it costs time and hides nothing here
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        memory.fill_uninitialized_memory = filled


@cache
def _packages() -> dict[str, str]:
    versions = {name: metadata.version(name) for name in PACKAGES}
    return {
        "nmke": nmke.__version__,
        **versions,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
