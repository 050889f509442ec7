"""The memory of earlier edits' keys: the same second moment however the keys arrive."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nmke.editors.memory import KeyMemory, SolverState

M = 6


def rows(count: int, seed: int = 0, d_mlp: int = M) -> Tensor:
    return torch.randn(count, d_mlp, generator=torch.Generator().manual_seed(seed)).double()


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(1, 9), max_size=8))
def test_moment_equals_the_dense_one_for_any_batch_sizes(sizes: list[int]):
    everything = rows(sum(sizes))
    memory = KeyMemory.empty(M)
    for part in everything.split(sizes) if sizes else []:
        memory = memory.remember(part)
    dense = everything.T @ everything
    index = torch.tensor([4, 0, 3])
    torch.testing.assert_close(memory.moment(), dense, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(memory.submatrix(index), dense[index][:, index], rtol=1e-12, atol=1e-12)
    assert memory.count == sum(sizes)
    assert len(memory.rows) <= M


@pytest.mark.parametrize("sizes", [(3,), (6,), (7,), (4, 4), (4, 4, 1)])
def test_rows_are_kept_until_there_are_more_than_neurons(sizes):
    memory = KeyMemory.empty(M)
    for seed, size in enumerate(sizes):
        memory = memory.remember(rows(size, seed))
    if sum(sizes) <= M:
        assert memory.gram is None
        assert torch.equal(memory.rows.double(), torch.cat([rows(n, i) for i, n in enumerate(sizes)]))
    else:
        assert memory.gram is not None and memory.gram.dtype == torch.float64
        assert len(memory.rows) == (1 if sizes == (4, 4, 1) else 0)


def test_submatrix_of_nothing_is_empty():
    assert KeyMemory.empty(M).remember(rows(2)).submatrix(torch.tensor([], dtype=torch.long)).shape == (0, 0)


def test_remember_leaves_the_earlier_memory_as_it_was():
    before = KeyMemory.empty(M).remember(rows(2))
    moment = before.moment()
    before.remember(rows(20, 1))
    assert before.count == 2
    assert torch.equal(before.moment(), moment)


@pytest.mark.parametrize("kept", [3, 20], ids=["as rows", "collapsed"])
def test_released_keys_are_as_if_never_remembered(kept):
    others, gone = rows(kept, seed=1), rows(2, seed=2)
    memory = KeyMemory.empty(M).remember(others[:2]).remember(gone).remember(others[2:])
    assert (memory.gram is None) is (kept == 3)
    memory = memory.release(gone)
    assert memory.count == kept
    torch.testing.assert_close(memory.moment(), others.T @ others, rtol=1e-12, atol=1e-12)


def test_only_the_first_of_two_equal_keys_is_released():
    memory = KeyMemory.empty(M).remember(rows(2)).remember(rows(2)).release(rows(2)[:1])
    assert torch.equal(memory.rows.double(), torch.cat([rows(2)[1:], rows(2)]))


def test_a_key_that_was_never_held_cannot_be_released():
    with pytest.raises(ValueError, match="a key that the memory never held"):
        KeyMemory.empty(M).remember(rows(2)).release(rows(1, seed=5))


def test_state_releases_keys_of_the_layers_named():
    state = SolverState().remember({3: rows(2), 5: rows(2, seed=1)})
    left = state.release({3: rows(2)[1:]})
    assert [left.memory(3, M).count, left.memory(5, M).count] == [1, 2]
    assert torch.equal(left.memory(3, M).rows.double(), rows(2)[:1])
    assert state.memory(3, M).count == 2


def test_state_keeps_one_memory_per_layer():
    empty = SolverState()
    first = empty.remember({3: rows(2), 5: rows(1, d_mlp=4)})
    second = first.remember({3: rows(1, 1)})
    assert empty.memory(3, M).count == 0
    assert [first.memory(3, M).count, first.memory(5, 4).count] == [2, 1]
    assert [second.memory(3, M).count, second.memory(5, 4).count] == [3, 1]
    assert second.memory(9, 7).rows.shape == (0, 7)
    expected = torch.cat([rows(2), rows(1, 1)])
    torch.testing.assert_close(second.memory(3, M).moment(), expected.T @ expected, rtol=1e-12, atol=1e-12)


def test_inputs_are_remembered_and_released_beside_the_keys():
    state = SolverState().remember({3: rows(2)}, {3: rows(2, 1), 4: rows(2, 2)}).remember({3: rows(1, 3)})
    assert state.memories[3].count == 3 and set(state.memories) == {3}
    assert torch.equal(state.inputs[4].rows.double(), rows(2, 2))
    left = state.release({3: rows(2)[:1]}, {4: rows(2, 2)[:1]})
    assert [left.memories[3].count, left.inputs[3].count, left.inputs[4].count] == [2, 2, 1]
    assert state.inputs[4].count == 2
