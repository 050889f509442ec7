"""Blocks that multiply in bfloat16 beside the model's own."""

import pytest
import torch
from tests import runs, tiny
from torch import nn
from transformers.pytorch_utils import Conv1D

from nmke.models import half_products
from nmke.models.half_products import HalfLinear, half_product_layout, pays_off, with_half_products
from nmke.models.load import EditableModel, load_model


def editable(build) -> EditableModel:
    return EditableModel.wrap(build(), tiny.tiny_tokenizer())


def test_a_half_linear_is_the_linear_map_within_bfloat16_rounding():
    torch.manual_seed(0)
    linear = nn.Linear(48, 16)
    hidden = torch.randn(5, 48)
    exact = hidden.double() @ linear.weight.double().T + linear.bias.double()
    found = HalfLinear(linear.weight, linear.bias)(hidden)
    assert found.dtype == torch.float32
    bound = 3 * 2**-8 * (hidden.abs().double() @ linear.weight.abs().double().T + exact.abs())
    assert ((found.double() - exact).abs() <= bound).all()
    assert (found.double() - exact).abs().max() > 0  # it did run in bfloat16


def test_copies_replace_blocks_from_the_first_on_and_leave_the_model_alone():
    model = editable(tiny.tiny_llama)
    before = {name: p.clone() for name, p in model.model.named_parameters()}
    layout = with_half_products(model.layout, 1)
    assert layout.layers[0] is model.layout.layers[0]
    for own, twin in zip(model.layout.layers[1:], layout.layers[1:], strict=True):
        assert twin.block is not own.block
        assert type(twin.down_proj) is HalfLinear
        assert any(module is twin.down_proj for module in twin.mlp.modules())
        assert not any(type(module) in (nn.Linear, Conv1D) for module in twin.block.modules())
        assert type(own.down_proj) is nn.Linear
    assert all(torch.equal(before[name], p) for name, p in model.model.named_parameters())


def test_a_conv1d_is_copied_the_right_way_round():
    model = editable(tiny.tiny_gpt2)
    parts = model.layout.layers[0]
    twin = with_half_products(model.layout, 0).layers[0]
    hidden = torch.randn(2, 3, parts.d_mlp)
    torch.testing.assert_close(twin.down_proj(hidden), parts.down_proj(hidden), rtol=0.02, atol=0.02)


def test_small_models_and_explicit_float32_keep_their_own_blocks():
    model = editable(tiny.tiny_llama)
    assert not pays_off(model)
    assert half_product_layout(model, "auto", 0) is None
    assert half_product_layout(model, "float32", 0) is None
    assert half_product_layout(model, "bfloat16", 0) is not None
    assert model.half_products is True


@pytest.mark.parametrize(
    "broken",
    [
        lambda self, hidden: hidden.new_zeros(*hidden.shape[:-1], 3),
        lambda self, hidden: hidden.new_zeros(*hidden.shape[:-1], len(self.weight)),
    ],
    ids=["another shape", "other values"],
)
def test_blocks_that_cannot_run_on_copies_are_not_used(broken, monkeypatch, caplog):
    model = editable(runs.loud_llama)
    monkeypatch.setattr(HalfLinear, "forward", broken)
    assert half_product_layout(model, "bfloat16", 0) is None
    assert model.half_products is False
    assert "bfloat16" in caplog.text


@pytest.mark.model
def test_rounding_alone_does_not_keep_the_real_model_from_them():
    model = load_model("smollm2-135m")
    for first in (5, 9, 13):  # from 9 on the error at the first token is largest
        model.half_products = None
        assert half_product_layout(model, "bfloat16", first) is not None


def test_wide_float32_models_take_bfloat16_where_the_processor_has_it(monkeypatch):
    model = editable(tiny.tiny_llama)
    monkeypatch.setattr(half_products, "SMALLEST_WIDTH", 1)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert pays_off(model)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert not pays_off(model)
