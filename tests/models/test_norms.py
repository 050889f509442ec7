"""Probed norms and logit maps against the modules and formulas they stand for."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers.models.cohere.modeling_cohere import CohereLayerNorm
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo.modeling_olmo import OlmoLayerNorm

from nmke.errors import LayoutError
from nmke.models.norms import FrozenNorm, LogitMap, crafted_scores, fit_logit_map
from nmke.models.tracing import record_inputs

D_MODEL = 32


def randomised(norm: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return norm


NORMS = {
    "llama": (lambda: LlamaRMSNorm(D_MODEL, eps=1e-6), False, 1e-6, False),
    "torch-rms": (lambda: nn.RMSNorm(D_MODEL, eps=1e-5), False, 1e-5, False),
    "gemma": (lambda: GemmaRMSNorm(D_MODEL, eps=1e-6), False, 1e-6, False),
    "layernorm": (lambda: nn.LayerNorm(D_MODEL, eps=1e-5), True, 1e-5, True),
    "layernorm-large-eps": (lambda: nn.LayerNorm(D_MODEL, eps=1e-1), True, 1e-1, True),
    "layernorm-small-eps": (lambda: nn.LayerNorm(D_MODEL, eps=1e-12), True, 1e-12, True),
    "layernorm-no-bias": (lambda: nn.LayerNorm(D_MODEL, bias=False), True, 1e-5, False),
    "cohere": (lambda: CohereLayerNorm(D_MODEL, eps=1e-5), True, 1e-5, False),
    "olmo": (lambda: OlmoLayerNorm(D_MODEL), True, 1e-5, False),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NORMS)
def test_probed_norm_equals_the_module(name: str, dtype: torch.dtype) -> None:
    make, centered, eps, has_bias = NORMS[name]
    norm = randomised(make()).to(dtype)
    found = FrozenNorm.probe(norm, D_MODEL)
    assert found.centered is centered
    assert (found.bias is not None) is has_bias
    assert found.eps == pytest.approx(eps, rel=1e-2)
    norm = norm.float()
    for size in (1e-4, 1e-2, 1.0, 1e3):
        x = size * (torch.randn(2, 3, D_MODEL, generator=torch.Generator().manual_seed(1)) + 0.3)
        torch.testing.assert_close(found.apply(x, found.scale_at(x)), norm(x), rtol=1e-3, atol=1e-5)


def test_an_odd_width_is_probed_too() -> None:
    norm = randomised(nn.LayerNorm(7))
    x = torch.randn(4, 7, generator=torch.Generator().manual_seed(1))
    found = FrozenNorm.probe(norm, 7)
    torch.testing.assert_close(found.apply(x, found.scale_at(x)), norm(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "layernorm"])
def test_frozen_norm_is_affine_in_its_input(name: str) -> None:
    found = FrozenNorm.probe(randomised(NORMS[name][0]()), D_MODEL)
    hidden, push = torch.randn(2, 3, D_MODEL, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    scale, mean = found.scale_at(hidden), hidden.mean(dim=-1, keepdim=True)
    moved = found.apply(hidden + 5 * push, scale, mean) - found.apply(hidden, scale, mean)
    torch.testing.assert_close(moved, 5 * push * scale * found.weight.double())


def test_scale_at_is_the_inverse_root_mean_square() -> None:
    found = FrozenNorm(weight=torch.ones(4), bias=None, centered=False, eps=0.75)
    hidden = torch.tensor([[1.0, -1.0, 2.0, 1.0]])
    torch.testing.assert_close(found.scale_at(hidden), torch.tensor([[(7 / 4 + 0.75) ** -0.5]]))


def test_scale_at_is_the_inverse_deviation_where_centred() -> None:
    found = FrozenNorm(weight=torch.ones(4), bias=None, centered=True, eps=0.0)
    hidden = torch.tensor([[3.0, 5.0, 3.0, 5.0]])
    torch.testing.assert_close(found.scale_at(hidden), torch.ones(1, 1))


class OnHalves(nn.Module):
    """Normalises two halves apart: no norm that can be frozen to one number."""

    def forward(self, hidden: Tensor) -> Tensor:
        return nn.functional.layer_norm(hidden.reshape(1, -1, 2, 16), (16,)).reshape(hidden.shape)


def zeroed() -> nn.Module:
    norm = LlamaRMSNorm(D_MODEL)
    nn.init.zeros_(norm.weight)
    return norm


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (nn.Identity, "relative error of .* on random input; only LayerNorm and RMSNorm"),
        (nn.Tanh, "relative error of .* on random input"),
        (OnHalves, "relative error of .* on random input"),
        (lambda: nn.Linear(D_MODEL, D_MODEL), "relative error of .* on random input"),
        (lambda: nn.LayerNorm(7), "found RuntimeError.*only LayerNorm and RMSNorm"),
        (zeroed, "weight is zero or not finite"),
    ],
)
def test_what_is_no_norm_is_refused(make: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        FrozenNorm.probe(make(), D_MODEL)


def test_probing_inside_a_recording_leaves_no_trace_in_it() -> None:
    norm = nn.LayerNorm(D_MODEL).train()
    with record_inputs({"norm": norm}) as seen:
        FrozenNorm.probe(norm, D_MODEL)
    assert not seen
    assert norm.training


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "expected",
    [LogitMap(), LogitMap(scale=0.0625), LogitMap(scale=8.0), LogitMap(softcap=30.0), LogitMap(0.5, 15.0)],
)
def test_logit_map_is_recovered(expected: LogitMap, dtype: torch.dtype) -> None:
    raw = crafted_scores(torch.zeros(1, 6, 64, dtype=dtype))
    found = fit_logit_map(raw, expected.apply(raw))
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    assert found.scale == pytest.approx(expected.scale, rel=tolerance)
    assert (found.softcap is None) == (expected.softcap is None)
    if expected.softcap is not None:
        assert found.softcap == pytest.approx(expected.softcap, rel=tolerance)


def test_logit_map_formula() -> None:
    raw = torch.tensor([0.0, 1.0, -50.0])
    torch.testing.assert_close(LogitMap(2.0, 10.0).apply(raw), 10 * torch.tanh(2 * raw / 10))
    assert LogitMap().apply(raw) is raw


@pytest.mark.parametrize("change", [torch.square, torch.exp, torch.relu, lambda raw: raw + 1.0])
def test_another_map_is_refused(change: Callable[[Tensor], Tensor]) -> None:
    raw = crafted_scores(torch.zeros(1, 6, 64))
    with pytest.raises(LayoutError, match="neither a constant factor nor a tanh bound"):
        fit_logit_map(raw, change(raw.clamp(max=80)) if change is torch.exp else change(raw))


def test_cut_logits_are_refused() -> None:
    raw = crafted_scores(torch.zeros(1, 6, 64))
    with pytest.raises(LayoutError, match="64 scores of the unembedding become 60 logits"):
        fit_logit_map(raw, raw[..., :60])
