"""Keys that are released from the memory: rows are dropped, or taken off the second moment."""

import pytest
import torch
from torch import Tensor

from nmke.editors.memory import KeyMemory, SolverState

M = 6


def rows(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, M, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kept_as_rows", [True, False])
def test_a_released_key_leaves_the_others(kept_as_rows):
    keys = rows(5 if kept_as_rows else 9)
    memory = KeyMemory.empty(M).remember(keys)
    assert (memory.gram is None) == kept_as_rows
    left = memory.release(keys[[1, 3]])
    rest = keys[[i for i in range(len(keys)) if i not in (1, 3)]].double()
    assert left.count == len(rest) and memory.count == len(keys)
    torch.testing.assert_close(left.moment(), rest.T @ rest, rtol=1e-10, atol=1e-10)
    if kept_as_rows:
        assert torch.equal(left.rows.double(), rest)


def test_one_of_two_equal_keys_is_released():
    key = rows(1)
    memory = KeyMemory.empty(M).remember(torch.cat([key, rows(1, 1), key])).release(key)
    assert torch.equal(memory.rows, torch.cat([rows(1, 1), key]))


def test_a_key_that_was_never_held_is_an_error():
    with pytest.raises(ValueError, match="never held"):
        KeyMemory.empty(M).remember(rows(2)).release(rows(1, 5))


def test_a_state_releases_in_the_layers_that_are_named():
    state = SolverState().remember({3: rows(2), 5: rows(2, 1)})
    left = state.release({3: rows(2)[:1]})
    assert (left.memories[3].count, left.memories[5].count, state.memories[3].count) == (1, 2, 2)
