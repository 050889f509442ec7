"""Weights against their base: all layers or none, exact restores, a hash of what differs."""

import pytest
import torch
from tests import runs
from tests.models.test_updates import new_neurons
from torch import Tensor

from nmke.errors import LedgerError, NumericsError
from nmke.models.weights import DownProjection
from nmke.types import Columns, LayerUpdate, MatrixPlace
from nmke.weights_state import WeightsState

DTYPES = (torch.float32, torch.bfloat16)


def update(layer: int, scale: float = 1.0, columns: int = 64, seed: int = 0) -> LayerUpdate:
    generator = torch.Generator().manual_seed(seed + layer)
    right = torch.randn(2, 64, generator=generator)
    right[:, columns:] = 0
    return LayerUpdate(layer, scale * torch.randn(32, 2, generator=generator), right)


def weight(state: WeightsState, layer: int) -> Tensor:
    return DownProjection(state.model.layout.layers[layer].down_proj).read()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_columns_bring_back_every_bit(dtype):
    state = WeightsState(runs.model(dtype))
    as_loaded, base = runs.bits(state.model), state.content_hash()
    first = state.apply([update(1, columns=7), update(2)])
    between, middle = runs.bits(state.model), state.content_hash()
    second = state.apply([update(1, seed=9)])
    assert [c.index.tolist() for c in first.columns.values()] == [list(range(7)), list(range(64))]
    assert len({base, middle, state.content_hash()}) == 3
    state.take_back(second)
    assert runs.bits(state.model) == between and state.content_hash() == middle
    state.take_back(first)
    assert runs.bits(state.model) == as_loaded and state.content_hash() == base == state.base_hash()


def test_one_layer_that_fails_restores_all():
    state = WeightsState(runs.model())
    as_loaded = runs.bits(state.model)
    with pytest.raises(NumericsError, match="NaN or infinity"):
        state.apply([update(1), update(2, scale=float("inf"))])
    assert runs.bits(state.model) == as_loaded


def test_what_changed_and_by_how_much():
    state = WeightsState(runs.model())
    assert state.changed() == [] and state.matrices() == {} and state.drift() == {}
    state.apply([update(2, columns=5)])
    (found,) = state.changed()
    assert (found.layer, found.columns, found.of) == (2, 5, 64)
    assert found.name == "model.layers.2.mlp.down_proj.weight" and list(state.matrices()) == [found.name]
    base = state.model.unedited[MatrixPlace(2)]
    expected = (weight(state, 2) - base).norm() / base.norm()
    assert state.drift() == {2: pytest.approx(float(expected))}


def test_the_hash_depends_on_the_content_alone():
    one, two = WeightsState(runs.model()), WeightsState(runs.model())
    one.apply([update(1), update(2)])
    two.apply([update(2)])
    two.apply([update(1)])
    assert one.content_hash() == two.content_hash()
    assert WeightsState(runs.model(torch.bfloat16)).content_hash() != two.base_hash()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_base_swaps_and_comes_back_even_after_an_error(dtype):
    state = WeightsState(runs.model(dtype))
    as_loaded = runs.bits(state.model)
    state.apply([update(1), update(2)])
    edited = runs.bits(state.model)
    with state.base():
        assert runs.bits(state.model) == as_loaded
        with state.base():
            assert runs.bits(state.model) == as_loaded
    with pytest.raises(KeyError), state.base():
        raise KeyError
    assert runs.bits(state.model) == edited


def test_matrices_of_a_head_are_loaded_and_reset():
    one, two = WeightsState(runs.model()), WeightsState(runs.model())
    as_loaded = runs.bits(two.model)
    one.apply([update(1), update(2, columns=3)])
    two.load({name: matrix.clone() for name, matrix in one.matrices().items()})
    assert two.content_hash() == one.content_hash() and runs.bits(two.model) == runs.bits(one.model)
    two.reset()
    assert runs.bits(two.model) == as_loaded


@pytest.mark.parametrize(
    "matrices",
    [
        {"model.layers.1.self_attn.q_proj.weight": torch.zeros(32, 32)},
        {"model.layers.1.mlp.down_proj.weight": torch.zeros(3, 4)},
    ],
)
def test_a_head_of_another_model_is_refused(matrices):
    with pytest.raises(LedgerError, match="is no MLP matrix of this model"):
        WeightsState(runs.model()).load(matrices)


def test_columns_of_another_type_are_refused():
    state = WeightsState(runs.model())
    with pytest.raises(NumericsError, match="exact restore needs the same type"):
        state.restore({MatrixPlace(1): Columns(torch.tensor([0]), torch.zeros(32, 1, dtype=torch.bfloat16))})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_whole_neurons_go_through_the_same_state(dtype):
    state, twin = WeightsState(runs.model(dtype)), WeightsState(runs.model(dtype))
    as_loaded, base = runs.bits(state.model), state.content_hash()
    linear = state.apply([update(1, columns=7)])
    between = state.content_hash()
    neurons = state.apply([new_neurons(state.model.layout, 1, (3, 60)), new_neurons(state.model.layout, 2)])
    found = {c.place: (c.name, c.columns) for c in state.changed()}
    assert found[MatrixPlace(2, "gate")] == ("model.layers.2.mlp.gate_proj.weight", 3)
    assert found[MatrixPlace(1, "up")] == ("model.layers.1.mlp.up_proj.weight", 2)
    assert found[MatrixPlace(1)][1] == 8 and len(found) == 6 and MatrixPlace(1, "up").label == "1 up"

    twin.load({name: matrix.clone() for name, matrix in state.matrices().items()})
    assert twin.content_hash() == state.content_hash() and runs.bits(twin.model) == runs.bits(state.model)
    before, after = (matrix.float() for matrix in state.before_and_after(MatrixPlace(2)))
    assert state.drift()[2] == pytest.approx(float((after - before).norm() / before.norm()))

    with state.base():
        assert runs.bits(state.model) == as_loaded
    state.take_back(neurons)
    assert state.content_hash() == between
    state.take_back(linear)
    assert runs.bits(state.model) == as_loaded and state.content_hash() == base
    twin.reset()
    assert runs.bits(twin.model) == as_loaded
