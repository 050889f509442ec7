"""Packed tails against padded ones, and what happens where a model's blocks cannot run packed."""

import dataclasses

import pytest
import torch
from tests import tiny
from tests.exact import exact
from tests.models.test_replay import rows_of
from torch import Tensor, nn

from nmke.models.load import EditableModel
from nmke.models.packed import NAME, Packing, UnpackableError, attention_configs
from nmke.models.replay import TailReplay, WholeForward, open_replay, replay_is_exact


@pytest.fixture
def packing() -> Packing:
    return Packing((2, 1, 3), [], 0)


def test_packing_keeps_the_real_tokens_in_order_and_unpacking_puts_them_back(packing):
    padded = torch.arange(18.0).reshape(3, 3, 2)
    packed = packing.pack(padded)
    assert torch.equal(packed[0, :, 0], torch.tensor([0.0, 2.0, 6.0, 12.0, 14.0, 16.0]))
    back = packing.unpack(packed)
    for row, length in enumerate((2, 1, 3)):
        assert torch.equal(back[row, :length], padded[row, :length])


def test_padding_takes_no_gradient_either_way(packing):
    padded = torch.randn(3, 3, 2, dtype=torch.float64, requires_grad=True)
    packing.pack(padded).square().sum().backward()
    real = torch.tensor([[True, True, False], [True, False, False], [True, True, True]])
    assert torch.equal(padded.grad, torch.where(real[..., None], 2 * padded.detach(), 0.0))
    packed = torch.randn(1, 6, 2, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(3, 3, 2, dtype=torch.float64)
    (packing.unpack(packed) * weights).sum().backward()
    assert torch.equal(packed.grad[0], weights[real])


def test_a_delta_is_added_at_the_first_token_of_each_row(packing):
    packed, delta = torch.zeros(1, 6, 2), torch.tensor([[1.0, 1], [2, 2], [3, 3]])
    assert packing.added(packed, delta)[0, :, 0].tolist() == [1, 0, 2, 3, 0, 0]
    assert packing.added(packed[0], delta)[:, 1].tolist() == [1, 0, 2, 3, 0, 0]


@pytest.mark.parametrize("shape", [(2, 3, 2), (12, 1, 3), (3, 4, 3, 3), (3, 2)])
def test_what_belongs_to_no_token_is_refused(packing, shape):
    with pytest.raises(UnpackableError, match="called with a tensor"):
        packing.calls([((), {"odd": torch.zeros(shape)})])


def runs(model: EditableModel, site, layers) -> list[int]:
    """Tokens that the last block is given in one run of a replay."""
    seen: list[int] = []
    replay = open_replay(model, rows_of(), layers, site)
    hook = model.layout.layers[-1].block.register_forward_pre_hook(
        lambda _m, args, kwargs: seen.append((args or (kwargs["hidden_states"],))[0].shape[:2].numel()),
        with_kwargs=True,
    )
    replay.run({layer: torch.zeros(5, 32, dtype=model.dtype) for layer in layers})
    hook.remove()
    return seen


@pytest.mark.parametrize("builder", [tiny.tiny_llama, tiny.tiny_gpt2, tiny.tiny_gemma2, tiny.tiny_gemma3])
def test_a_replay_runs_the_real_tokens_alone(builder, tokenizer):
    model = EditableModel.wrap(builder(len(tokenizer)), tokenizer)
    assert replay_is_exact(model) and model.packable
    assert runs(model, "block", (0,)) == runs(model, "down_proj", (0, 1)) == [sum(rows_of().tail_lengths)]
    assert all(config._attn_implementation != NAME for config in attention_configs([model.model]))


class ShortRows(nn.Module):
    """A block that takes a batch, but no row as long as all tails behind one another."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, hidden: Tensor, *args: object, **kwargs: object) -> Tensor:
        if len(hidden) == 1 and hidden.shape[1] > 8:
            raise ValueError("this block takes no long rows")
        return self.block(hidden, *args, **kwargs)


def test_a_model_that_does_not_run_packed_runs_with_padding():
    model = exact(tiny.tiny_llama, num_hidden_layers=3)
    layers = model.model.model.layers
    layers[2] = ShortRows(layers[2])
    parts = (*model.layout.layers[:2], dataclasses.replace(model.layout.layers[2], block=layers[2]))
    model = dataclasses.replace(model, layout=dataclasses.replace(model.layout, layers=parts))
    assert replay_is_exact(model) and model.packable is False
    rows = rows_of()
    assert runs(model, "block", (1,)) == [len(rows.ids) * max(rows.tail_lengths)]


def test_attention_that_adds_to_the_scores_is_not_run_packed(monkeypatch):
    model = exact(tiny.tiny_llama, num_hidden_layers=3)
    from nmke.models import packed

    monkeypatch.setattr(packed, "READABLE", ("flash_attention_2",))
    assert replay_is_exact(model)
    assert isinstance(replay := open_replay(model, rows_of(), (1,), "block"), TailReplay)
    assert replay._packed is None


def test_another_thread_may_run_the_model_meanwhile():
    """It sees no packing, so that its attention is the ordinary one, masks and all."""
    model = exact(tiny.tiny_llama, num_hidden_layers=3)
    rows = rows_of()
    delta = {1: torch.zeros(5, 32, dtype=torch.float64)}
    alone = WholeForward(model, rows, (1,), "block").run(delta)
    configs = attention_configs([parts.block for parts in model.layout.layers])
    for config in configs:
        config._attn_implementation = NAME
    together = WholeForward(model, rows, (1,), "block").run(delta)
    for row, length in enumerate(rows.tail_lengths):
        torch.testing.assert_close(together[row, :length], alone[row, :length], rtol=1e-9, atol=1e-9)
