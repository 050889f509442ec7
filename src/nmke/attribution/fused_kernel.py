"""The GPU kernel behind `fused.py`: a product and a log-sum-exp in one pass, in Triton.

One program takes a tile of neurons and a stretch of the vocabulary. It forms the tile's slopes
[neurons, tokens] = rows · unembeddingᵀ with float32 sums, and for each prompt adds Σ_v p_v exp(step · slope_v) to a
running maximum and sum in the manner of flash attention (Dao et al. 2022, arXiv:2205.14135, sec. 3.1). Slopes live in
registers only. The stretches of one neuron are joined afterwards.
Importing this file needs `triton`, which CUDA builds of torch bring along.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

NEURONS, TOKENS, WIDTH = 64, 128, 64  # of one tile
STRETCHES = 8  # parts of the vocabulary that run side by side
WARPS = 4


def log_totals(log_p: Tensor, rows: Tensor, unembedding: Tensor, steps: Tensor) -> Tensor:
    """See `nmke.attribution.fused.log_totals`; every tensor contiguous, on one CUDA device (or interpreted)."""
    (prompts, d_vocab), (neurons, d_model) = log_p.shape, rows.shape
    stretches = max(1, min(STRETCHES, triton.cdiv(d_vocab, TOKENS)))
    tiles = triton.cdiv(triton.cdiv(d_vocab, stretches), TOKENS)
    highest = torch.full((stretches, prompts, neurons), -torch.inf, device=rows.device)
    total = torch.zeros_like(highest)
    grid = (triton.cdiv(neurons, NEURONS), stretches)
    exact = "ieee" if rows.dtype == torch.float32 else "tf32"
    _tile[grid](
        log_p, rows, unembedding, steps, highest, total, prompts, neurons, d_vocab, d_model, tiles,
        NEURONS=NEURONS, TOKENS=TOKENS, WIDTH=WIDTH, PRECISION=exact, UPCAST=not rows.is_cuda,
        num_warps=WARPS,
    )  # fmt: skip
    return torch.logsumexp(highest + total.log(), dim=0)


@triton.jit
def _tile(  # type: ignore[no-untyped-def]  # Triton reads types off the arguments
    log_p, rows, unembedding, steps, highest, total, prompts, neurons, d_vocab, d_model, tiles,
    NEURONS: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    # Pointers to [prompts d_vocab], [neurons d_model], [d_vocab d_model],
    # [prompts neurons], and twice [stretches prompts neurons].
    neuron = tl.program_id(0) * NEURONS + tl.arange(0, NEURONS)
    stretch = tl.program_id(1)
    is_neuron = neuron < neurons
    for tile in range(tiles):
        token = (stretch * tiles + tile) * TOKENS + tl.arange(0, TOKENS)
        is_token = token < d_vocab
        slope = tl.zeros((NEURONS, TOKENS), dtype=tl.float32)
        for start in range(0, d_model, WIDTH):
            channel = start + tl.arange(0, WIDTH)
            is_channel = channel < d_model
            left = tl.load(
                rows + neuron[:, None] * d_model + channel[None, :],
                mask=is_neuron[:, None] & is_channel[None, :], other=0.0,
            )  # fmt: skip
            right = tl.load(
                unembedding + token[None, :].to(tl.int64) * d_model + channel[:, None],
                mask=is_token[None, :] & is_channel[:, None], other=0.0,
            )  # fmt: skip
            if (
                UPCAST
            ):  # the interpreter takes bfloat16 for integers; products are exact in float32 either way
                left, right = left.to(tl.float32), right.to(tl.float32)
            slope = tl.dot(left, right, slope, input_precision=PRECISION)
        for prompt in range(prompts):
            step = tl.load(steps + prompt * neurons + neuron, mask=is_neuron, other=0.0)
            base = tl.load(log_p + prompt * d_vocab + token, mask=is_token, other=float("-inf"))
            place = (stretch * prompts + prompt) * neurons + neuron
            before = tl.load(highest + place, mask=is_neuron, other=0.0)
            so_far = tl.load(total + place, mask=is_neuron, other=0.0)
            shifted = base[None, :] + step[:, None] * slope
            now = tl.maximum(before, tl.max(shifted, axis=1))
            safe = tl.where(now == float("-inf"), 0.0, now)  # a stretch behind the end of the vocabulary
            so_far = so_far * tl.exp(before - safe) + tl.sum(tl.exp(shifted - safe[:, None]), axis=1)
            tl.store(highest + place, now, mask=is_neuron)
            tl.store(total + place, so_far, mask=is_neuron)
        tl.debug_barrier()  # the next tile's loads may be another thread's
