"""Files of a batch: what earlier versions wrote is read, and what only writes down-projections keeps its names."""

from dataclasses import replace

import torch
from safetensors.torch import load_file, save_file
from tests import runs
from tests.models.test_updates import new_neurons
from tests.test_weights_state import update

from nmke.batch_file import BATCH_SCHEMA, read_before, read_columns, read_rows, read_writes, write_batch
from nmke.editors.pipeline import BatchResult
from nmke.editors.targets import Targets
from nmke.types import MatrixPlace
from nmke.weights_state import WeightsState


def result(updates, rows):
    keys = {u.layer: torch.arange(rows * 64.0).reshape(rows, 64) for u in updates}
    targets = Targets("down_proj", (), {}, {}, (0.0,) * rows, (1.0,) * rows, (1,) * rows)
    return BatchResult(tuple(updates), keys, targets, {}, tuple(range(rows)), {})


def test_a_file_in_the_format_of_earlier_versions_is_read(tmp_path):
    left, right = torch.randn(32, 2), torch.zeros(2, 64)
    right[:, [3, 9]] = 1.0
    tensors = {
        "layer.4.left": left,
        "layer.4.right": right,
        "layer.4.keys": torch.ones(2, 64),
        "layer.4.columns": torch.tensor([3, 9], dtype=torch.int32),
        "layer.4.before": torch.full((32, 2), 7.0),
        "layer.4.mask": torch.ones(64, dtype=torch.uint8),
        "layer.4.target_values": torch.ones(2, 32),
        "owners": torch.tensor([0, 1], dtype=torch.int32),
    }
    save_file(tensors, tmp_path / "b.safetensors", metadata={"schema": BATCH_SCHEMA})
    before = read_before(tmp_path / "b.safetensors")
    assert list(before.columns) == [MatrixPlace(4, "down")] and not before.side
    assert torch.equal(before.columns[MatrixPlace(4)].values, tensors["layer.4.before"])
    index, d_mlp = read_columns(tmp_path / "b.safetensors")[4]
    assert index.tolist() == [3, 9] and d_mlp == 64
    write = read_writes(tmp_path / "b.safetensors")[4]
    assert write.after is None and torch.equal(write.delta, left.double() @ right.double())
    torch.testing.assert_close(write.of_edit(0) + write.of_edit(1), write.delta)
    torch.testing.assert_close(write.column_norms(1), write.of_edit(1).norm(dim=0))


def test_a_batch_of_linear_writes_keeps_the_names_that_earlier_versions_read(tmp_path):
    state = WeightsState(runs.model())
    updates = [update(2, columns=5)]
    write_batch(tmp_path / "b.safetensors", result(updates, 2), state.apply(updates))
    names = ("left", "right", "keys", "columns", "before")
    assert set(load_file(tmp_path / "b.safetensors")) == {"owners", *(f"layer.2.{name}" for name in names)}


def test_whole_neurons_are_kept_with_what_they_replaced(tmp_path):
    state = WeightsState(runs.model())
    as_loaded, updates = runs.bits(state.model), [new_neurons(state.model.layout, 1)]
    written = replace(result(updates, 3), memory_inputs={1: torch.rand(3, 33), 2: torch.rand(3, 33)})
    write_batch(tmp_path / "b.safetensors", written, state.apply(updates))
    before = read_before(tmp_path / "b.safetensors")
    assert list(before.columns) == [MatrixPlace(1, part) for part in ("down", "gate", "up")]
    index, d_mlp = read_columns(tmp_path / "b.safetensors")[1]
    assert index.tolist() == [2, 5, 40] and d_mlp == 64
    keys, inputs = read_rows(tmp_path / "b.safetensors", 1)
    assert torch.equal(keys[1], written.memory_keys[1][1:2])
    assert list(read_rows(tmp_path / "b.safetensors")[0]) == [1]
    assert all(torch.equal(inputs[i], written.memory_inputs[i][1:2]) for i in (1, 2)) and len(inputs) == 2

    write, base = read_writes(tmp_path / "b.safetensors")[1], state.before_and_after(MatrixPlace(1))
    torch.testing.assert_close(write.delta, (base[1] - base[0]).double())
    own = write.of_edit(1)
    torch.testing.assert_close(write.column_norms(1), own.norm(dim=0))
    assert own.any(dim=0).nonzero().flatten().tolist() == [2]  # the second row's neuron
    state.take_back(before)
    assert runs.bits(state.model) == as_loaded
