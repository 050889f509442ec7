"""Replays against plain forward passes of one row at a time, in float64: hidden states, anchors and gradients."""

import dataclasses
import itertools

import pytest
import torch
from tests import tiny
from tests.exact import exact
from tests.tiers import sampled
from torch import Tensor, nn

from nmke.models.load import EditableModel
from nmke.models.replay import (
    AnchoredRows,
    BlockReplay,
    Site,
    TailReplay,
    WholeForward,
    open_replay,
    replay_is_exact,
)
from nmke.models.tokens import pad_batch
from nmke.models.tracing import first_tensor

BUILDERS = {
    "llama": lambda: exact(tiny.tiny_llama, num_hidden_layers=3),
    "qwen2": lambda: exact(tiny.tiny_qwen2, num_hidden_layers=3),
    "gpt2": lambda: exact(tiny.tiny_gpt2, n_layer=3),
    "gptneox": lambda: exact(tiny.tiny_gptneox, num_hidden_layers=3),
    "gemma3": lambda: exact(
        tiny.tiny_gemma3,
        num_hidden_layers=3,
        sliding_window=4,
        layer_types=["full_attention", "sliding_attention", "full_attention"],
    ),
    "opt": lambda: exact(tiny.tiny_opt, num_hidden_layers=3),
}
SITES: dict[str, tuple[Site, tuple[int, ...]]] = {
    "block": ("block", (1,)),
    "first block": ("block", (0,)),
    "last block": ("block", (2,)),
    "down_proj": ("down_proj", (0, 2)),
    "last down_proj": ("down_proj", (2,)),
}
LENGTHS, ANCHORS = (9, 6, 7, 4, 8), (5, 3, 0, 3, 2)  # an anchor at 0, and one at the last token


def rows_of(lengths: tuple[int, ...] = LENGTHS, anchors: tuple[int, ...] = ANCHORS) -> AnchoredRows:
    ids = tuple(tuple((11 * row + 7 * i + 5) % 300 for i in range(n)) for row, n in enumerate(lengths))
    return AnchoredRows(ids, anchors)


@pytest.fixture(scope="module", params=BUILDERS)
def model(request: pytest.FixtureRequest) -> EditableModel:
    return BUILDERS[request.param]()


@pytest.fixture
def llama_exact() -> EditableModel:
    return BUILDERS["llama"]()


def deltas_for(model: EditableModel, rows: AnchoredRows, layers: tuple[int, ...], seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    size = (len(rows.ids), model.layout.d_model)
    return {layer: torch.randn(*size, generator=generator).double().requires_grad_() for layer in layers}


def plain(
    model: EditableModel, ids: tuple[int, ...], anchor: int, site: Site, deltas: dict[int, Tensor]
) -> tuple[Tensor, dict[int, Tensor]]:
    """Hidden states before the final norm from the anchor on, and what stood at the sites before the deltas."""
    before: dict[int, Tensor] = {}
    final: list[Tensor] = []
    handles = [model.layout.final_norm.register_forward_pre_hook(lambda _m, args: final.append(args[0][0]))]
    for layer, delta in deltas.items():
        parts = model.layout.layers[layer]

        def hook(_module, _args, output, layer=layer, delta=delta):
            hidden = output[0] if isinstance(output, tuple) else output
            flat = hidden.ndim == 2  # OPT runs its MLP on [batch*seq d_model]
            rows = hidden if flat else hidden[0]
            before[layer] = rows[anchor].detach().clone()
            one = torch.zeros(len(rows), 1, dtype=torch.float64)
            one[anchor] = 1.0
            changed = rows + one * delta
            changed = changed if flat else changed[None]
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        module = parts.block if site == "block" else parts.down_proj
        handles.append(module.register_forward_hook(hook))
    model.model(torch.tensor([ids]), use_cache=False)
    for handle in handles:
        handle.remove()
    return final[-1][anchor:], before


def outcome(run, deltas: dict[int, Tensor], rows: AnchoredRows, seed: int = 9):
    """Per row the hidden states of the tail, and the gradients of a random linear loss on them."""
    generator = torch.Generator().manual_seed(seed)
    tails = run()
    loss = torch.zeros((), dtype=torch.float64)
    for tail in tails:
        loss = loss + (tail * torch.randn(tail.shape, generator=generator).double()).sum()
    return [tail.detach() for tail in tails], torch.autograd.grad(loss, list(deltas.values()))


def replayed(replay, deltas: dict[int, Tensor], rows: AnchoredRows):
    def run() -> list[Tensor]:
        hidden = replay.run(deltas)
        return [hidden[row, :length] for row, length in enumerate(rows.tail_lengths)]

    return outcome(run, deltas, rows)


def plainly(model: EditableModel, site: Site, deltas: dict[int, Tensor], rows: AnchoredRows):
    def run() -> list[Tensor]:
        return [
            plain(model, ids, anchor, site, {layer: delta[row] for layer, delta in deltas.items()})[0]
            for row, (ids, anchor) in enumerate(zip(rows.ids, rows.anchors, strict=True))
        ]

    return outcome(run, deltas, rows)


def assert_same(left, right) -> None:
    for a, b in zip((*left[0], *left[1]), (*right[0], *right[1]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


KINDS = itertools.product((open_replay, WholeForward), SITES)


@pytest.mark.parametrize(
    ("kind", "place"), sampled(KINDS, lambda one: one[0] is open_replay or one[1] in ("block", "down_proj"))
)
def test_replay_equals_plain_forwards_one_row_at_a_time(model, place, kind):
    site, layers = SITES[place]
    rows = rows_of()
    deltas = deltas_for(model, rows, layers)
    replay = kind(model, rows, layers, site)
    assert_same(replayed(replay, deltas, rows), plainly(model, site, deltas, rows))
    for row, (ids, anchor) in enumerate(zip(rows.ids, rows.anchors, strict=True)):
        _, before = plain(model, ids, anchor, site, {layer: delta[row] for layer, delta in deltas.items()})
        unmoved = plain(model, ids, anchor, site, {layer: torch.zeros(32) for layer in layers})[1]
        assert torch.equal(before[layers[0]], unmoved[layers[0]])
        for layer in layers:
            torch.testing.assert_close(replay.anchors[layer][row], unmoved[layer], rtol=1e-9, atol=1e-9)


def test_the_fast_replay_is_the_one_that_runs(model):
    assert replay_is_exact(model)
    assert isinstance(open_replay(model, rows_of(), (1,), "block"), TailReplay)
    assert isinstance(open_replay(model, rows_of(), (0, 2), "down_proj"), TailReplay)


@pytest.mark.parametrize("place", ["block", "down_proj"])
@pytest.mark.parametrize(
    "chosen", sampled([[0, 1, 2, 3, 4], [3, 1], [2], [4, 0, 2]], lambda rows: len(rows) < 3)
)
def test_selected_rows_give_what_they_gave_in_the_whole(model, place, chosen):
    site, layers = SITES[place]
    rows = rows_of()
    deltas = deltas_for(model, rows, layers)
    part_rows = rows.select(chosen)
    part = {layer: delta.detach()[chosen].requires_grad_() for layer, delta in deltas.items()}
    replay = open_replay(model, rows, layers, site).select(chosen)
    assert_same(replayed(replay, part, part_rows), plainly(model, site, part, part_rows))
    again = replay.select(list(range(len(chosen)))[::-1])
    turned = {layer: delta.detach().flip(0).requires_grad_() for layer, delta in part.items()}
    assert_same(
        replayed(again, turned, part_rows.select(list(range(len(chosen)))[::-1])),
        plainly(model, site, turned, part_rows.select(list(range(len(chosen)))[::-1])),
    )


@pytest.mark.parametrize("place", ["block", "down_proj"])
def test_blocks_whose_output_nobody_reads_are_recorded_on_one_row(model, place):
    site, layers = SITES[place]
    seen: dict[int, list[int]] = {}
    handles = [
        p.block.register_forward_hook(
            lambda _m, _a, out, i=i: seen.setdefault(i, []).append(len(first_tensor(out)))
        )
        for i, p in enumerate(model.layout.layers)
    ]
    replay_is_exact(model)
    seen.clear()
    open_replay(
        model, rows_of((5, 3, 7), (0, 0, 0)), layers, site
    )  # without prefixes: one pass, the recording
    for handle in handles:
        handle.remove()
    assert seen == {i: [3 if i <= layers[-1] else 1] for i in range(3)}


def test_selecting_rows_runs_nothing(model):
    rows = rows_of()
    replay = open_replay(model, rows, (0, 1), "down_proj")
    ran: list[int] = []
    handles = [p.block.register_forward_hook(lambda *_: ran.append(1)) for p in model.layout.layers]
    part = replay.select([3, 1])
    for handle in handles:
        handle.remove()
    assert not ran and isinstance(part, TailReplay)


def test_what_blocks_get_by_row_and_head_is_recorded_again(llama_exact):
    """A bias [rows x heads, ...] cannot be told apart by rows; the picker says so instead of guessing."""
    replay = BlockReplay.record(llama_exact, llama_exact.inputs(pad_batch([[1, 2, 3], [4, 5, 6]], 0)), 0)
    (args, kwargs), *others = replay.calls
    odd = dataclasses.replace(replay, calls=((args, {**kwargs, "alibi": torch.zeros(8, 1, 3)}), *others))
    index = torch.tensor([1])
    assert replay.select(index, None) is not None
    assert odd.select(index, None) is None


def test_rows_without_any_prefix(model):
    rows = rows_of((5, 3), (0, 0))
    for site, layers in (SITES["block"], SITES["down_proj"]):
        deltas = deltas_for(model, rows, layers)
        replay = open_replay(model, rows, layers, site)
        assert_same(replayed(replay, deltas, rows), plainly(model, site, deltas, rows))


def test_eager_attention_in_float32_gives_the_same(tokenizer):
    for builder in (tiny.tiny_llama, tiny.tiny_gpt2, tiny.tiny_gptneox, tiny.tiny_gemma2, tiny.tiny_gemma3):
        model = EditableModel.wrap(builder(len(tokenizer)), tokenizer)
        rows = rows_of()
        deltas = {1: 0.1 * torch.randn(5, 32, generator=torch.Generator().manual_seed(0))}
        fast = TailReplay(model, rows, (1,), "down_proj").run(deltas)
        slow = WholeForward(model, rows, (1,), "down_proj").run(deltas)
        for row, length in enumerate(rows.tail_lengths):
            torch.testing.assert_close(fast[row, :length], slow[row, :length], rtol=1e-4, atol=1e-4)


def test_replays_run_twice_and_leave_no_trace(llama_exact):
    rows = rows_of()
    deltas = deltas_for(llama_exact, rows, (0, 1))
    replay = open_replay(llama_exact, rows, (0, 1), "down_proj")
    first = replay.run(deltas)
    replay.run({layer: 3 * delta for layer, delta in deltas.items()})
    assert torch.equal(first, replay.run(deltas))
    assert not any(each._forward_hooks or each._forward_pre_hooks for each in llama_exact.model.modules())


class Talking(nn.Module):
    """A block whose output depends on what an earlier block left outside the hidden states."""

    def __init__(self, block: nn.Module, notes: dict[str, Tensor], writes: bool) -> None:
        super().__init__()
        self.block, self.notes, self.writes = block, notes, writes

    def forward(self, hidden: Tensor, *args: object, **kwargs: object) -> Tensor:
        made = self.block(hidden, *args, **kwargs)
        if self.writes:
            self.notes["mean"] = made.cumsum(1)[
                :, -1:
            ]  # of all positions of this pass, the tail's alone in a replay
            return made
        return made + self.notes["mean"] / (1 + self.notes["mean"].norm())


def test_a_model_whose_blocks_talk_past_the_stream_falls_back_to_whole_forwards():
    model = exact(tiny.tiny_llama, num_hidden_layers=3)
    notes: dict[str, Tensor] = {}
    layers = model.model.model.layers
    for index, writes in ((0, True), (2, False)):
        layers[index] = Talking(layers[index], notes, writes)
    model = EditableModel(
        **{
            name: getattr(model, name)
            for name in ("model", "tokenizer", "encoder", "layout", "name", "source")
        },
        path=None,
        dtype=model.dtype,
        device=model.device,
    )
    assert not replay_is_exact(model)
    assert model.replayable is False
    assert isinstance(open_replay(model, rows_of(), (1,), "block"), WholeForward)


def test_a_model_that_refuses_a_replay_falls_back_to_whole_forwards(llama_exact, monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise TypeError("this cache cannot be given")

    monkeypatch.setattr("nmke.models.replay.tail_inputs", refuse)
    assert isinstance(open_replay(llama_exact, rows_of(), (1,), "block"), WholeForward)


def test_exactness_is_tried_once(llama_exact, monkeypatch):
    assert replay_is_exact(llama_exact)
    monkeypatch.setattr("nmke.models.replay.replay_agrees", lambda *_: pytest.fail("tried again"))
    assert replay_is_exact(llama_exact)


def test_block_replay_repeats_a_forward_and_follows_new_weights(model):
    batch = pad_batch([list(ids) for ids in rows_of().ids], 0)
    replay = BlockReplay.record(model, model.inputs(batch), 1, 2)
    whole: list[Tensor] = []
    handle = model.layout.layers[2].block.register_forward_hook(
        lambda _m, _a, out: whole.append(out[0] if isinstance(out, tuple) else out)
    )
    with torch.no_grad():
        model.model(**model.inputs(batch))
    handle.remove()
    real = batch.attention_mask > 0
    torch.testing.assert_close(replay.run(replay.hidden)[real], whole[0][real], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        replay.run_block(2, replay.run(replay.hidden, last=1))[real], whole[0][real], rtol=1e-12, atol=1e-12
    )
