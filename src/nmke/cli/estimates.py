"""What preparing and editing would cost on this machine: measured speed, counted work; rough, and marked so."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nmke.config import EditConfig
    from nmke.models.load import EditableModel
    from nmke.preparing import Needed

PROBE_TOKENS = 128
TRIES = 3
PROMPT_TOKENS = 20  # a prompt with a context in front
CONTEXTS = 6
BACKWARD = 3  # a step forward and back, in forward passes
NAME_TOKENS = 7  # the beginning of a sentence up to the end of a name in it
GENERATION = 2.5  # one token written in a batch, in tokens read


@dataclass(frozen=True)
class Cost:
    """A rough estimate.

    Args:
        seconds: Time.
        memory_mb: Largest memory beside the model.
        disk_mb: What is kept in the cache.
    """

    seconds: float
    memory_mb: float
    disk_mb: float


def tokens_per_second(model: EditableModel) -> float:
    """Speed of reading, measured on a short batch, the best of three."""
    import torch

    from nmke.models.tokens import pad_batch

    ids = (model.encoder.encode("The quick brown fox jumps over the lazy dog. " * 20))[:PROBE_TOKENS]
    batch = pad_batch([ids] * 2, model.encoder.pad_id, device=model.device)
    with torch.inference_mode():
        best = float("inf")
        for _ in range(TRIES):
            begun = time.perf_counter()
            model.model(**model.inputs(batch))
            if model.device.type == "cuda":
                torch.cuda.synchronize()
            best = min(best, time.perf_counter() - begun)
    return 2 * len(ids) / best


def prepare_cost(model: EditableModel, found: Sequence[Needed], config: EditConfig, speed: float) -> Cost:
    """Of gathering what is missing: the text is written once and read once for each kind of statistics."""
    from nmke.stats.subjects import COUNT

    layout = model.layout
    missing = [one for one in found if one.missing]
    tokens = 0.0
    for one in missing:
        read = COUNT * NAME_TOKENS if one.kind == "subjects" else config.corpus_tokens
        tokens += read * (max(one.missing) + 1) / layout.n_layers
    if any(one.unwritten for one in missing):
        tokens += config.corpus_tokens * GENERATION
    sizes = [
        sum((layout.layers[i].d_mlp if one.kind == "keys" else layout.d_model + 1) ** 2 for i in one.missing)
        for one in missing
    ]
    return Cost(tokens / speed, max(sizes, default=0) * 4 / 1e6, sum(sizes) * 4 / 1e6)


def edit_cost(model: EditableModel, layers: Sequence[int], config: EditConfig, speed: float) -> Cost:
    """Of one edit; memory is for a whole batch."""
    behind = 1 - min(layers) / model.layout.n_layers
    tokens = CONTEXTS * PROMPT_TOKENS
    seconds = config.steps * 0.6 * BACKWARD * behind * tokens / speed + (2 + len(layers)) * tokens / speed
    squares = sum(model.layout.layers[i].d_mlp ** 2 for i in layers)
    matrices = sum(model.layout.layers[i].d_mlp for i in layers) * model.layout.d_model
    return Cost(seconds, (squares * 12 + matrices * 8) / 1e6, 0.0)


def model_mb(model: EditableModel) -> float:
    """Memory of the weights."""
    return sum(p.numel() * p.element_size() for p in model.model.parameters()) / 1e6


def duration(seconds: float) -> str:
    """Seconds in words."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
