"""The fused log-sum-exp: the kernel, interpreted on the CPU, against the plain path, and that against a literal one."""

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from nmke.attribution.fused import log_totals, plain_log_totals, runs_fused

SHAPES = {  # prompts, neurons, vocabulary, width: none a multiple of a tile
    "one tile": (2, 5, 40, 24),
    "edges everywhere": (3, 70, 300, 72),
    "more stretches than tiles": (1, 3, 1, 8),
}


def inputs(shape: tuple[int, int, int, int], dtype: torch.dtype, size: float = 3.0) -> tuple[Tensor, ...]:
    prompts, neurons, d_vocab, d_model = shape
    generator = torch.Generator().manual_seed(sum(shape))

    def draw(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator)

    rows, unembedding = draw(neurons, d_model) / d_model**0.5, draw(d_vocab, d_model)
    log_p = torch.log_softmax(4 * draw(prompts, d_vocab), dim=1)
    return log_p, rows.to(dtype), unembedding.to(dtype), size * draw(prompts, neurons)


def literal(log_p: Tensor, rows: Tensor, unembedding: Tensor, steps: Tensor) -> Tensor:
    slopes = rows.double() @ unembedding.double().T
    return (log_p.double()[:, None] + steps.double()[..., None] * slopes).logsumexp(dim=2)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_plain_path_equals_the_literal_formula(shape, dtype, monkeypatch):
    monkeypatch.setattr("nmke.attribution.fused.CHUNK_FLOATS", 7 * shape[2])
    given = inputs(shape, dtype)
    found = plain_log_totals(*given)
    torch.testing.assert_close(found.double(), literal(*given), rtol=1e-5, atol=1e-5)


def test_no_step_leaves_the_total_at_one():
    log_p, rows, unembedding, steps = inputs(SHAPES["one tile"], torch.float32)
    torch.testing.assert_close(
        log_totals(log_p, rows, unembedding, 0 * steps), torch.zeros(2, 5), atol=1e-6, rtol=0
    )


def test_the_kernel_is_off_without_cuda():
    assert not runs_fused(torch.zeros(1))


KERNEL = """
import torch
from tests.attribution.test_fused import SHAPES, inputs, literal
from nmke.attribution.fused import plain_log_totals
from nmke.attribution.fused_kernel import log_totals

for shape in SHAPES.values():
    for dtype, most, size in ((torch.float32, 2e-5, 3.0), (torch.bfloat16, 2e-5, 3.0), (torch.bfloat16, 2e-4, 40.0)):
        given = inputs(shape, dtype, size)
        found = log_totals(*given)
        for twin in (plain_log_totals(*given), literal(*given)):
            error = float((found - twin).abs().max())
            assert error < most, (shape, dtype, size, error)
"""


def test_the_kernel_gives_the_numbers_of_the_plain_path():
    """In a process of its own: Triton reads TRITON_INTERPRET when it is imported."""
    pytest.importorskip("triton", reason="triton comes with CUDA builds of torch")
    done = subprocess.run(
        [sys.executable, "-c", KERNEL],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_on_a_gpu(dtype):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    given = [tensor.cuda() for tensor in inputs((6, 1000, 5003, 512), dtype)]
    assert runs_fused(given[1])
    error = (log_totals(*given) - literal(*given)).abs().max()
    assert float(error) < (1e-4 if dtype == torch.float32 else 1e-3)
