"""Log Σ_v p_v exp(step · slope_v) for every prompt and neuron, without the slopes [neurons, d_vocab] ever in memory.

A Triton kernel on CUDA, chosen by itself; a plain chunked twin everywhere else, with the same numbers.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

CHUNK_FLOATS = 1 << 23  # slopes that the plain path holds at once


def runs_fused(tensor: Tensor) -> bool:
    """Whether the kernel takes this tensor's device and type."""
    types = (torch.bfloat16, torch.float16, torch.float32)
    return tensor.is_cuda and tensor.dtype in types and importlib.util.find_spec("triton") is not None


def log_totals(
    log_p: Float[Tensor, "prompts d_vocab"],
    rows: Float[Tensor, "neurons d_model"],
    unembedding: Float[Tensor, "d_vocab d_model"],
    steps: Float[Tensor, "prompts neurons"],
) -> Float[Tensor, "prompts neurons"]:
    """Log of the partition function that each neuron's step changes, relative to 1 without it; nats.

    Args:
        log_p: Log-probabilities before, float32.
        rows: What a unit step of each neuron adds to the residual stream behind the frozen norm.
        unembedding: Weight of the unembedding, of the type of `rows`; products are summed in float32.
        steps: How far each prompt moves along each neuron, float32.
    """
    if runs_fused(rows):
        from nmke.attribution import fused_kernel

        given = (log_p.float(), rows, unembedding, steps.float())
        return fused_kernel.log_totals(*(tensor.contiguous() for tensor in given))
    return plain_log_totals(log_p, rows, unembedding, steps)


def plain_log_totals(log_p: Tensor, rows: Tensor, unembedding: Tensor, steps: Tensor) -> Tensor:
    """The same by a product per chunk of neurons and one exponential per prompt."""
    parts = [
        torch.stack(
            [(base + step[:, None] * slope).logsumexp(dim=1) for base, step in zip(log_p, own, strict=True)]
        )
        for slope, own in _with_steps(rows, unembedding, steps)
    ]
    return torch.cat(parts, dim=1)


def _with_steps(rows: Tensor, unembedding: Tensor, steps: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Chunks of slopes [neurons, d_vocab] in float32 or wider, with the prompts' steps along them."""
    size = max(1, CHUNK_FLOATS // len(unembedding))
    exact = torch.promote_types(rows.dtype, torch.float32)
    matrix = unembedding.to(exact).T
    for start in range(0, len(rows), size):
        yield rows[start : start + size].to(exact) @ matrix, steps[:, start : start + size]
