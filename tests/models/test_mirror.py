"""What is sent to other processes: whatever was written since, in every matrix that a session wrote."""

import copy

import torch
from tests import runs
from tests.models.test_updates import new_neurons

from nmke.models.updates import put_back
from nmke.types import LayerUpdate, MatrixPlace
from nmke.weights_state import WeightsState


def test_whole_neurons_are_sent_once_and_make_a_copy_equal():
    state = WeightsState(runs.model())
    model, follower = state.model, copy.deepcopy(state.model)
    layers = model.layout.layers

    def follow():
        changes = model.mirror.changes(layers, model.unedited)
        put_back(follower.layout, changes)
        return {(place.layer, place.part): sorted(c.index.tolist()) for place, c in changes.items()}

    first = follow()  # a copied model's counters are unknown: all down-projections go out
    assert all(part == "down" for _, part in first)
    before = state.apply([new_neurons(model.layout, 1)])
    assert follow() == {(1, part): [2, 5, 40] for part in ("up", "gate", "down")}
    assert follow() == {} and runs.bits(follower) == runs.bits(model)
    state.take_back(before)
    assert set(follow()) == {(1, part) for part in ("up", "gate", "down")}
    assert runs.bits(follower) == runs.bits(model)
    right = torch.zeros(1, 64)
    right[:, 7] = 1.0
    state.apply([LayerUpdate(2, torch.ones(32, 1), right)])
    assert follow() == {(2, "down"): [7]} and MatrixPlace(2) in model.unedited
    assert runs.bits(follower) == runs.bits(model)
