"""When a batch does not fit in memory: the settings that need less, with the numbers that were tried."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from nmke.config import EditConfig
from nmke.errors import MemoryPlanError, is_out_of_memory


@contextmanager
def smaller_plan(edits: int, config: EditConfig) -> Iterator[None]:
    """Turn running out of memory inside the `with` into an error that names a smaller plan.

    Args:
        edits: Facts of the batch.
        config: Its settings, resolved.

    Raises:
        MemoryPlanError: If memory ran out, of the process or of the device.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise MemoryPlanError(
            f"{edits} facts at once do not fit in memory ({reason}); nothing was changed: try {_less(edits, config)}"
        ) from error


def _less(edits: int, config: EditConfig) -> str:
    """Settings that need about half, those that cost least first."""
    ways = []
    if edits > 1:
        ways.append(f"--batch-size {max(1, edits // 2)} (now {edits})")
    if config.token_budget > 1:
        ways.append(f"--token-budget {max(1, config.token_budget // 2)} (now {config.token_budget})")
    if config.layers is not None and len(config.layers) > 1:
        ways.append(f"fewer --layers (now {len(config.layers)})")
    return ", ".join([*ways, "--dtype bfloat16", "or another --device"])
