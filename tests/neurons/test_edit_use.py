"""Which neurons an edit used, against sums over one neuron at a time."""

import pytest
import torch
from tests import runs

from nmke.batch_file import LayerWrite, read_writes
from nmke.errors import RequestError
from nmke.neurons.edit_use import edit_use
from nmke.types import Columns


def write(rows: int = 3, d_model: int = 4, d_mlp: int = 6) -> LayerWrite:
    generator = torch.Generator().manual_seed(0)
    left, right, keys = (
        torch.randn(shape, generator=generator) for shape in ((d_model, rows), (rows, d_mlp), (rows, d_mlp))
    )
    right[:, 4] = 0  # a neuron that the mask keeps out
    columns = torch.tensor([0, 1, 2, 3, 5], dtype=torch.int32)
    before = torch.randn(d_model, 5, generator=generator)
    mask = torch.tensor([1, 1, 1, 1, 0, 1], dtype=torch.bool)
    owners = torch.tensor([0, 1, 0], dtype=torch.int32)  # the last row is a second anchor of the first edit
    return LayerWrite(left, right, keys, owners, Columns(columns, before), mask)


def test_parts_are_the_projections_of_each_neurons_write_and_add_up():
    given = write()
    (use,) = edit_use({5: given}, 1, count=5)
    delta, key = given.left.double() @ given.right.double(), given.keys[1].double()
    wrote = delta @ key
    expected = {i: float(key[i] * delta[:, i] @ wrote / (wrote @ wrote)) for i in range(6)}
    assert sum(expected.values()) == pytest.approx(1.0) and expected[4] == 0.0
    assert {n.neuron: n.carries for n in use.top} == pytest.approx({i: expected[i] for i in (0, 1, 2, 3, 5)})
    assert [n.carries for n in use.top] == sorted((n.carries for n in use.top), reverse=True)
    best = sorted(expected.values(), reverse=True)
    assert use.for_half == next(n for n in range(1, 7) if sum(best[:n]) >= 0.5)
    assert use.allowed == 5 and use.d_mlp == 6 and use.written == pytest.approx(float(wrote.norm()))


def test_columns_before_and_after_and_the_edits_own_share():
    given = write()
    (use,) = edit_use({5: given}, 0, count=5)
    delta = given.left.double() @ given.right.double()
    for one in use.top:
        column = given.before.index.tolist().index(one.neuron)
        before = given.before.values[:, column].double()
        torch.testing.assert_close(one.after, before + delta[:, one.neuron])
        assert one.change == pytest.approx(float(delta[:, one.neuron].norm() / before.norm()))
    own = given.left[:, [0, 2]].double() @ given.right[[0, 2]].double()
    assert use.share == pytest.approx(float(own.norm() / delta.norm()))


def test_an_edit_that_the_batch_did_not_write_is_refused():
    with pytest.raises(RequestError, match=r"wrote no edit number 7; it wrote 2"):
        edit_use({5: write()}, 7)


def test_a_real_batch_is_read_back_and_its_columns_are_those_of_the_model(tmp_path):
    with runs.open_run(tmp_path / "run", method="nmke", mask="entropy") as session:
        plain = {i: session.model.layout.layers[i].down_proj.weight.detach().clone() for i in runs.LAYERS}
        runs.edit_all(session, runs.facts(2))
        path = next((tmp_path / "run" / "edits").glob("*.safetensors"))
        for use in edit_use(read_writes(path), 1, count=3):
            now = session.model.layout.layers[use.layer].down_proj.weight
            assert use.allowed < use.d_mlp and use.top
            for one in use.top:
                torch.testing.assert_close(one.before.float(), plain[use.layer][:, one.neuron])
                torch.testing.assert_close(one.after.float(), now[:, one.neuron], rtol=1e-4, atol=1e-5)
