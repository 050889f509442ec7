"""Whole neurons are replaced and put back bit for bit, in every kind of matrix, all or nothing."""

import pytest
import torch
from tests import tiny
from torch import nn
from transformers.pytorch_utils import Conv1D

from nmke.errors import LayoutError, NumericsError
from nmke.models.layout import probe_layout
from nmke.models.updates import matrix_at, put_back, write_update
from nmke.models.weights import ReadingMatrix
from nmke.types import Columns, LayerUpdate, MatrixPlace

KINDS = {
    "linear": lambda: nn.Linear(4, 6),
    "bare": lambda: nn.Linear(4, 6, bias=False),
    "conv1d": lambda: Conv1D(6, 4),
}
BUILDERS = (tiny.tiny_llama, tiny.tiny_gpt2)


def new_neurons(layout, layer=1, index=(5, 2, 40), seed=0) -> LayerUpdate:
    """Random content for some neurons in every matrix of a layer."""
    generator = torch.Generator().manual_seed(seed)
    parts = ("up", "down") if layout.layers[layer].read_in.gate is None else ("up", "gate", "down")
    chosen = torch.tensor(index, dtype=torch.int32)
    replaced = {}
    for part in parts:
        matrix = layout.layers[layer].matrix(part).read()
        values = torch.randn(len(matrix), len(chosen), generator=generator).to(matrix)
        replaced[part] = Columns(chosen, values)
    d_model, d_mlp = layout.d_model, layout.layers[layer].d_mlp
    return LayerUpdate(layer, torch.zeros(d_model, 0), torch.zeros(0, d_mlp), replaced=replaced)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_reading_matrix_has_a_column_per_neuron(kind, dtype):
    module = KINDS[kind]().to(dtype)
    matrix, hidden = ReadingMatrix(module), torch.randn(3, 4, dtype=dtype)
    padded = torch.cat([hidden, torch.ones(3, 1, dtype=dtype)], 1) if matrix.has_bias else hidden
    torch.testing.assert_close(padded @ matrix.read(), module(hidden), rtol=2e-2, atol=2e-2)
    before, index = matrix.read().clone(), torch.tensor([4, 1])
    image = matrix.columns(index)
    matrix.restore(index, torch.full_like(image, 2.0))
    assert bool((matrix.read()[:, index] == 2.0).all())
    assert torch.equal(matrix.read()[:, [0, 2, 3, 5]], before[:, [0, 2, 3, 5]])
    assert not torch.equal(module(hidden)[:, 1], (padded @ before)[:, 1])
    matrix.restore(index, image)
    assert torch.equal(matrix.read(), before)


@pytest.mark.parametrize("build", BUILDERS)
def test_neurons_are_replaced_and_come_back(build):
    model = build()
    layout = probe_layout(model)
    as_loaded = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    update = new_neurons(layout)
    assert update.columns.nonzero().flatten().tolist() == [2, 5, 40]
    before = write_update(layout, update)
    for part, columns in update.replaced.items():
        place = MatrixPlace(1, part)
        assert torch.equal(matrix_at(layout, place).columns(columns.index.long()), columns.values)
        assert torch.equal(before[place].index, columns.index)
    changed = {n for n, t in model.state_dict().items() if not torch.equal(t, as_loaded[n])}
    assert changed and all(".1." in name and "mlp" in name for name in changed)
    put_back(layout, before)
    assert all(torch.equal(as_loaded[name], tensor) for name, tensor in model.state_dict().items())


def test_a_part_that_is_not_finite_takes_the_others_back():
    model = tiny.tiny_llama()
    layout = probe_layout(model)
    as_loaded = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    update = new_neurons(layout)
    update.replaced["down"].values[0, 0] = float("nan")
    with pytest.raises(
        NumericsError, match=r"3 columns of the down-projection of layer 1 .* NaN or infinity"
    ):
        write_update(layout, update)
    assert all(torch.equal(as_loaded[name], tensor) for name, tensor in model.state_dict().items())


def test_a_part_that_the_model_lacks_is_refused():
    layout = probe_layout(tiny.tiny_gpt2())
    with pytest.raises(LayoutError, match="its MLP has none"):
        matrix_at(layout, MatrixPlace(0, "gate"))
