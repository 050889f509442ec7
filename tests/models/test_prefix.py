"""Prefixes run with shared beginnings against prefixes run whole."""

import pytest
import torch
from tests import tiny
from tests.exact import exact

from nmke.models.load import EditableModel
from nmke.models.prefix import AnchoredRows, common_heads, prefix_states, select_states

CONTEXT = (5, 9, 11, 3, 8, 2)
PREFIXES = (
    (*CONTEXT, 7, 21),
    (30, 31),
    (*CONTEXT, 7, 22, 23, 24),
    (),
    (*CONTEXT, 40),
    (12, 13, 14, 15, 16, 17, 18),
    (12, 13, 14, 15, 16, 17, 18),
)
BUILDERS = {
    "gpt2": lambda: exact(tiny.tiny_gpt2, n_layer=2),
    "llama": lambda: exact(tiny.tiny_llama, num_hidden_layers=2),
    "gemma3": lambda: exact(tiny.tiny_gemma3, num_hidden_layers=2),
}


@pytest.fixture(scope="module", params=BUILDERS)
def model(request: pytest.FixtureRequest) -> EditableModel:
    return BUILDERS[request.param]()


def test_heads_are_the_beginnings_that_rows_share():
    found = common_heads(PREFIXES)
    assert [found[r] for r in (0, 2, 4)] == [CONTEXT] * 3
    assert found[1] == found[3] == ()
    assert found[5] == found[6] == (12, 13, 14, 15, 16, 17)  # one token is left to each row


def test_a_short_or_shrinking_beginning_is_not_shared():
    assert common_heads([(1, 2, 3, 4), (1, 2, 3, 5)]) == [(), ()]
    long = tuple(range(20))
    rows = [(*long, 50), (*long, 51), (*long[:5], 60, 61)]
    assert common_heads(rows) == [long, long, ()]


def test_states_equal_those_of_each_prefix_alone(model):
    rows = AnchoredRows(tuple((*prefix, 60, 61) for prefix in PREFIXES), tuple(map(len, PREFIXES)))
    states = prefix_states(model, rows)
    longest = max(map(len, PREFIXES))
    for r, prefix in enumerate(PREFIXES):
        if not prefix:
            continue
        alone = prefix_states(model, rows.select([r]))
        for (keys, values), (own_keys, own_values) in zip(states, alone, strict=True):
            assert keys.shape[-2] == longest
            torch.testing.assert_close(keys[r, :, longest - len(prefix) :], own_keys[0])
            torch.testing.assert_close(values[r, :, longest - len(prefix) :], own_values[0])


def test_selected_states_are_cut_to_the_longest_prefix_left(model):
    rows = AnchoredRows(tuple((*prefix, 60, 61) for prefix in PREFIXES), tuple(map(len, PREFIXES)))
    states = prefix_states(model, rows)
    part = select_states(states, [4, 0], longest=8)
    assert [keys.shape[-2] for keys, _ in part] == [8] * len(states)
    assert torch.equal(part[0][0][1], states[0][0][0][:, -8:])
    assert select_states(states, [3], longest=0) == []
