"""Keys and current values of a batch against one plain forward per prompt, in float64."""

from collections.abc import Mapping

import pytest
import torch
from tests import tiny
from tests.exact import exact
from torch import Tensor

from nmke.editors.keys import KeyPass, _average_weights
from nmke.editors.rows import prompt_rows
from nmke.models.key_pass import SharedPass, WholePass
from nmke.models.load import EditableModel
from nmke.models.weights import DownProjection
from nmke.types import EditRequest

CONTEXTS = ("", "I was late. ", "The train had left. ", "Because ")
REQUESTS = (
    EditRequest("The capital of {} is", "France", "Rome"),
    EditRequest("{} was late, therefore", "I", "in Paris"),  # the bare prompt's anchor is position 0
    EditRequest("{} was born in the old city of", "Ada Lovelace", "Tokyo"),
)
LAYERS = (1, 2)
BUILDERS = {
    "llama": lambda: exact(tiny.tiny_llama, num_hidden_layers=4),
    "gpt2": lambda: exact(tiny.tiny_gpt2, n_layer=4),
    "gemma3": lambda: exact(tiny.tiny_gemma3, num_hidden_layers=4),
    "opt": lambda: exact(tiny.tiny_opt, num_hidden_layers=4),
}


@pytest.fixture(params=BUILDERS)
def model(request: pytest.FixtureRequest) -> EditableModel:
    return BUILDERS[request.param]()


@pytest.fixture
def gpt2_exact() -> EditableModel:
    return BUILDERS["gpt2"]()


def read_one(
    model: EditableModel, text: str, end: int, deltas: Mapping[int, Tensor]
) -> tuple[int, dict[int, Tensor], Tensor]:
    """Anchor, keys there per layer, and the last edited layer's output there, from a forward of the whole text."""
    ids, anchor = model.encoder.encode(text), model.encoder.subject_last_index(text, end)
    keys: dict[int, Tensor] = {}
    outputs: list[Tensor] = []
    handles = []
    for layer in LAYERS:

        def hook(_module, args, output, layer=layer):
            flat = args[0].ndim == 2  # OPT
            keys[layer] = (args[0] if flat else args[0][0])[anchor].clone()
            if layer not in deltas:
                return None
            changed = output.clone()
            (changed if flat else changed[0])[anchor] += deltas[layer]
            return changed

        handles.append(model.layout.layers[layer].down_proj.register_forward_hook(hook))
    last = model.layout.layers[LAYERS[-1]].block
    handles.append(
        last.register_forward_hook(
            lambda _m, _a, out: outputs.append(out[0] if isinstance(out, tuple) else out)
        )
    )
    with torch.no_grad():
        model.model(torch.tensor([ids]), use_cache=False)
    for handle in handles:
        handle.remove()
    return anchor, keys, outputs[0][0, anchor]


def literal(
    model: EditableModel, contexts: tuple[str, ...], deltas: Mapping[int, Tensor]
) -> tuple[dict[int, Tensor], Tensor]:
    """Keys per layer [edits d_mlp] and current values [edits d_model]."""
    keys: dict[int, list[Tensor]] = {layer: [] for layer in LAYERS}
    values = []
    for edit, request in enumerate(REQUESTS):
        own = {layer: delta[edit] for layer, delta in deltas.items()}
        found = [
            (context, *read_one(model, context + request.text, len(context) + request.subject_end, own))
            for context in contexts
        ]
        kept = [(context, key, value) for context, anchor, key, value in found if anchor > 0]
        for layer in LAYERS:
            bare = [key[layer] for context, key, _ in kept if not context]
            others = [key[layer] for context, key, _ in kept if context]
            means = [torch.stack(part).mean(0) for part in (bare, others) if part]
            keys[layer].append(torch.stack(means).mean(0))
        values.append(kept[0][2])
    return {layer: torch.stack(rows) for layer, rows in keys.items()}, torch.stack(values)


def assert_same(found, expected) -> None:
    for layer in LAYERS:
        assert found[0][layer].dtype == torch.float64
        torch.testing.assert_close(found[0][layer], expected[0][layer], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("replayable", [True, False], ids=["replayed", "whole forwards"])
def test_keys_equal_those_of_single_forwards(model, replayable):
    model.replayable = None if replayable else False
    rows = KeyPass(model, REQUESTS, CONTEXTS, LAYERS)
    assert isinstance(rows._pass, SharedPass if replayable else WholePass)
    assert_same(rows.collect(), literal(model, CONTEXTS, {}))


@pytest.mark.parametrize("replayable", [True, False], ids=["replayed", "whole forwards"])
def test_keys_under_deltas_equal_those_of_single_forwards(model, replayable):
    model.replayable = None if replayable else False
    generator = torch.Generator().manual_seed(0)
    size = (len(REQUESTS), model.layout.d_model)
    deltas = {layer: torch.randn(*size, generator=generator).double() for layer in LAYERS}
    rows = KeyPass(model, REQUESTS, CONTEXTS, LAYERS)
    plain = rows.collect()
    found = rows.collect(deltas)
    assert_same(found, literal(model, CONTEXTS, deltas))
    torch.testing.assert_close(found[0][1], plain[0][1])  # a delta moves the keys of later layers only
    assert not torch.allclose(found[0][2], plain[0][2], atol=1e-3)


def test_keys_follow_writes_into_the_edited_layers(gpt2_exact):
    rows = KeyPass(gpt2_exact, REQUESTS, CONTEXTS, LAYERS)
    before = rows.collect()
    generator = torch.Generator().manual_seed(1)
    left, right = (torch.randn(*size, generator=generator).double() for size in ((32, 2), (2, 64)))
    DownProjection(gpt2_exact.layout.layers[1].down_proj).add(left, right)
    after = rows.collect()
    assert_same(after, literal(gpt2_exact, CONTEXTS, {}))
    assert not torch.allclose(before[0][2], after[0][2], atol=1e-3)


@pytest.mark.parametrize("replayable", [True, False], ids=["replayed", "whole forwards"])
def test_only_layers_behind_the_changed_one_are_read_again(gpt2_exact, replayable):
    gpt2_exact.replayable = None if replayable else False
    rows = KeyPass(gpt2_exact, REQUESTS, CONTEXTS, LAYERS)
    first = rows.collect()
    generator = torch.Generator().manual_seed(1)
    for layer in LAYERS:
        left, right = (torch.randn(*size, generator=generator).double() for size in ((32, 2), (2, 64)))
        DownProjection(gpt2_exact.layout.layers[layer].down_proj).add(left, right)
        keys, current = rows.collect(changed=layer)
        assert set(keys) == {i for i in LAYERS if i >= layer}
        assert_same(({**first[0], **keys}, current), literal(gpt2_exact, CONTEXTS, {}))
        first = ({**first[0], **keys}, current)


def test_contexts_are_run_once_and_no_layer_before_the_changed_one_again(gpt2_exact):
    contexts = ("", "The train had left the city. ", "I was late and therefore walked. ")
    seen: list[tuple[int, int]] = []
    handles = [
        parts.block.register_forward_hook(
            lambda _m, args, _out, layer=layer: seen.append((layer, args[0].shape[0] * args[0].shape[1]))
        )
        for layer, parts in enumerate(gpt2_exact.layout.layers)
    ]
    gpt2_exact.replayable = True
    rows = KeyPass(gpt2_exact, REQUESTS, contexts, LAYERS)
    rows.collect()
    assert sorted({layer for layer, _ in seen}) == [0, 1, 2]  # nothing behind the last edited layer
    assert all(
        sum(layer == each for each, _ in seen) == 2 for layer in (0, 1, 2)
    )  # beginnings, then the rest
    tokens = sum(size for layer, size in seen if layer == 0)
    whole = WholePass(gpt2_exact, rows_of(gpt2_exact, contexts), LAYERS)._batch.input_ids
    assert tokens < 0.75 * whole.numel()
    seen.clear()
    rows.collect(changed=2)
    assert {layer for layer, _ in seen} == {2}
    for handle in handles:
        handle.remove()


def rows_of(model: EditableModel, contexts: tuple[str, ...]) -> list[tuple[int, ...]]:
    found = [row for request in REQUESTS for row in prompt_rows(model, request, contexts)]
    return [row.ids[: row.anchor + 1] for row in found]


def test_single_layer_and_single_context(gpt2_exact):
    requests = [REQUESTS[0], REQUESTS[2]]
    found, _ = KeyPass(gpt2_exact, requests, ("",), (2,)).collect()
    for edit, request in enumerate(requests):
        _, keys, _ = read_one(gpt2_exact, request.text, request.subject_end, {})
        torch.testing.assert_close(found[2][edit], keys[2], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "bare, expected",
    [
        ([[True, False, False]], [[1 / 2, 1 / 4, 1 / 4]]),
        ([[False, False]], [[1 / 2, 1 / 2]]),
        ([[True]], [[1]]),
        ([[True, False], [False], [True]], [[0.5, 0.5, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]),
    ],
)
def test_average_is_half_bare_and_half_the_mean_of_the_others(bare, expected):
    assert torch.equal(_average_weights(bare), torch.tensor(expected, dtype=torch.float64))


def test_reading_keys_leaves_no_trace(gpt2_exact):
    before = {name: value.clone() for name, value in gpt2_exact.model.state_dict().items()}
    KeyPass(gpt2_exact, REQUESTS, CONTEXTS, LAYERS).collect()
    assert all(torch.equal(before[name], value) for name, value in gpt2_exact.model.state_dict().items())
    assert not any(each._forward_hooks or each._forward_pre_hooks for each in gpt2_exact.model.modules())
