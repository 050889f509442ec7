"""Silenced neurons write nothing, and come back bit for bit."""

import pytest
import torch
from tests import runs

from nmke.neurons.silence import silenced


def masks(model, **chosen: list[int]) -> dict[int, torch.Tensor]:
    found = {}
    for name, neurons in chosen.items():
        layer = int(name.removeprefix("layer"))
        found[layer] = torch.zeros(model.layout.layers[layer].d_mlp, dtype=torch.bool)
        found[layer][neurons] = True
    return found


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.model(torch.arange(12)[None] + 60).logits


def test_silence_equals_zero_coefficients_at_every_token():
    model = runs.model()
    chosen = masks(model, layer1=[0, 7, 20], layer3=[2])

    def hook_for(mask):
        return lambda _module, args: (args[0] * ~mask, *args[1:])

    before = logits(model)
    handles = [
        model.layout.layers[layer].down_proj.register_forward_pre_hook(hook_for(mask))
        for layer, mask in chosen.items()
    ]
    expected = logits(model)
    for handle in handles:
        handle.remove()
    with silenced(model, chosen):
        torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-6)
    assert (expected - before).abs().max() > 1e-4
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_bit_comes_back_also_after_an_error(dtype):
    model = runs.model(dtype)
    before = runs.bits(model)
    with pytest.raises(KeyError), silenced(model, masks(model, layer0=[1, 2], layer2=[5])):
        assert runs.bits(model) != before
        raise KeyError
    assert runs.bits(model) == before
