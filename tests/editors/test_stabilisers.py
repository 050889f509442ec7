"""Stabilisers: each against its formula written out in float64, and the combinations that are refused."""

import math

import pytest
import torch
from tests import runs, tiny
from tests.editors.test_pipeline import CONTEXTS, LAYERS, REQUESTS, edit, resolved, stats_of, write
from tests.exact import exact
from torch import Tensor

from nmke.batches import resolve
from nmke.config import EditConfig
from nmke.editors import methods, stabilisers
from nmke.editors.memory import KeyMemory, SolverState
from nmke.editors.method import Batch
from nmke.editors.norm_anchor import anchored, mlp_outputs, pilot_norms
from nmke.editors.pipeline import compute_updates
from nmke.editors.prune import Restraint
from nmke.editors.rect import RelativeChange
from nmke.editors.revive import Revive
from nmke.editors.sphere import Sphere
from nmke.editors.stabilisers import principal_directions, weighed
from nmke.editors.targets import Targets, optimise_targets
from nmke.errors import ConfigError
from nmke.models.load import EditableModel
from nmke.models.weights import DownProjection
from nmke.progress import quiet
from nmke.types import LayerUpdate, MatrixPlace

D, M, RANK = 5, 9, 3


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


BASE = random(D, M, seed=1)
NOW = BASE + 0.1 * random(D, M, seed=2)
UPDATE = LayerUpdate(4, random(D, RANK, seed=3), random(RANK, M, seed=4))
DELTA = UPDATE.left.double() @ UPDATE.right.double()


@pytest.fixture
def model() -> EditableModel:
    return exact(tiny.tiny_llama, num_hidden_layers=4)


def test_rect_keeps_the_entries_of_largest_relative_change():
    found = RelativeChange(0.4)(UPDATE, NOW, BASE).delta.double()
    relative = sorted((abs(DELTA[i, j] / NOW[i, j]).item(), i, j) for i in range(D) for j in range(M))
    expected = torch.zeros_like(DELTA)
    for _, i, j in relative[-round(0.4 * D * M) :]:
        expected[i, j] = DELTA[i, j]
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_rect_leaves_the_columns_of_other_neurons_alone():
    keep = torch.tensor([1, 0, 1, 1, 0, 0, 1, 1, 0], dtype=torch.bool)
    masked = LayerUpdate(4, UPDATE.left, UPDATE.right * keep)
    found = RelativeChange(0.9)(masked, NOW, BASE)
    assert not found.right[:, ~keep].any() and found.right[:, keep].any()


def test_prune_takes_the_logarithm_of_singular_values_above_those_of_the_weights():
    small = 0.3 * BASE
    found = Restraint(1.2)(UPDATE, small + 0.1, small).delta.double()
    total = 0.1 * torch.ones(D, M, dtype=torch.float64) + (small + 0.1 - small - 0.1).double() + DELTA
    left, values, right = torch.linalg.svd(total, full_matrices=False)
    top = torch.linalg.svdvals(small.double())[0]
    assert (values > top).any() and (values < top).any()
    pressed = [math.log(v, 1.2) - math.log(top, 1.2) + top if v > top else v for v in values]
    expected = left @ torch.diag(torch.tensor(pressed, dtype=torch.float64)) @ right
    torch.testing.assert_close(found + 0.1, expected, rtol=1e-4, atol=1e-5)


def test_prune_leaves_a_small_update_as_it_is():
    assert Restraint()(UPDATE, 100 * BASE, 100 * BASE) is UPDATE


@pytest.mark.parametrize("shape", [(D, M), (M, D)])
def test_principal_directions_hold_their_share_of_the_energy(shape):
    matrix = random(*shape, seed=5)
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    for kept in range(1, D + 1):
        share = float(values[:kept].square().sum() / values.square().sum()) - 1e-9
        outputs, inputs = principal_directions(matrix, share)
        assert outputs.shape == (shape[0], kept) and inputs.shape == (shape[1], kept)
        for found, expected in ((outputs, left[:, :kept]), (inputs, right[:kept].T)):
            torch.testing.assert_close(found @ found.T, expected @ expected.T, rtol=1e-8, atol=1e-10)


def test_sphere_damps_what_reads_principal_directions():
    values, vectors = torch.linalg.eigh(NOW.double().T @ NOW.double() / D)
    kept = next(r for r in range(1, M) if values[-r:].sum() >= 0.5 * values.sum())
    projector = torch.eye(M, dtype=torch.float64) - 0.7 * vectors[:, -kept:] @ vectors[:, -kept:].T
    found = Sphere(strength=0.7)(UPDATE, NOW, BASE)
    torch.testing.assert_close(found.delta.double(), DELTA @ projector, rtol=1e-4, atol=1e-5)
    assert found.right.shape == UPDATE.right.shape


def test_revive_drops_every_term_that_touches_a_dominant_direction():
    left, values, right = torch.linalg.svd(BASE.double())
    energy = values.square().cumsum(0) / values.square().sum()
    kept = int((energy < 0.5).sum()) + 1
    expected = torch.zeros(D, M, dtype=torch.float64)
    for i in range(kept, D):
        for j in range(kept, M):
            expected += (left[:, i] @ DELTA @ right[j]) * torch.outer(left[:, i], right[j])
    found = Revive()(UPDATE, NOW, BASE).delta.double()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_hse_weighs_few_earlier_edits_like_a_thousand_and_more_of_them_as_they_are():
    keys = random(4, M, seed=6)
    memory = KeyMemory.empty(M).remember(keys)
    assert weighed(memory, ("rect",)) is memory and weighed(KeyMemory.empty(M), ("hse",)).count == 0
    torch.testing.assert_close(
        weighed(memory, ("hse",)).moment(), 250 * memory.moment(), rtol=1e-4, atol=1e-4
    )
    many = KeyMemory(keys, 3 * memory.moment(), 2000)
    assert torch.equal(weighed(many, ("hse",)).moment(), many.moment())


def test_history_weight_reaches_the_solve(model):
    past = SolverState().remember(edit(model, "memit").memory_keys)
    found = []
    for settings in ({}, {"stabilisers": ("hse",)}):
        config = resolved("memit-memory", **settings)
        batch = Batch(model, REQUESTS[:2], CONTEXTS, config, stats=stats_of(model), state=past)
        result = compute_updates(methods.get("memit-memory"), batch)
        old = past.memories[1].rows.double()
        found.append(float((result.updates[0].delta.double() @ old.T).norm()))
    assert found[1] < 0.3 * found[0]


def test_encore_stops_on_the_second_step_in_a_row_with_the_answer_on_top():
    model, facts = runs.model(), runs.facts(4)
    settings = {"lr": 2.0, "steps": 30, "clamp": 8.0, "stop_loss": 0.0, "weight_decay": 0.01}

    def steps(stop_argmax: int) -> tuple[int, ...]:
        config = EditConfig.create(stop_argmax=stop_argmax, **settings)
        return optimise_targets(model, facts, CONTEXTS, (2,), "block", config).steps

    never, once, twice = steps(0), steps(1), steps(2)
    assert never == (30,) * 4 and min(twice) < 30
    for first, second in zip(once, twice, strict=True):
        assert second == 30 or second >= first + 1


def test_encore_is_a_setting_that_can_be_set_otherwise(model):
    config = resolve(EditConfig.create(method="memit", layers=(1, 2), stabilisers=("encore",)), model)
    assert config.stop_argmax == 2
    other = EditConfig.create(method="memit", layers=(1, 2), stabilisers=("encore",), stop_argmax=5)
    assert resolve(other, model).stop_argmax == 5


def test_blue_writes_both_ends_each_for_its_own_values():
    model = exact(tiny.tiny_llama, num_hidden_layers=5)
    layers = (1, 2, 3)
    both = edit(model, "memit", layers=layers, stabilisers=("blue",))
    assert [update.layer for update in both.updates] == [1, 3] and both.targets.layers == (1, 3)
    first = edit(model, "memit", layers=(1,))
    assert torch.equal(first.updates[0].right, both.updates[0].right)
    write(model, first.updates)
    last = edit(model, "memit", layers=(3,))
    assert torch.equal(last.updates[0].left, both.updates[1].left)
    assert torch.equal(last.memory_keys[3], both.memory_keys[3])
    assert both.targets.steps == tuple(
        a + b for a, b in zip(first.targets.steps, last.targets.steps, strict=True)
    )


def test_norm_anchor_rescales_values_and_skips_those_far_beyond(model):
    delta = torch.tensor([[3.0, 0.0], [0.0, 30.0]])
    old, residual = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[7.0, 7.0], [8.0, 8.0]])
    targets = Targets("block", (2,), {2: delta}, {2: residual + delta}, (0.0, 0.0), (1.0, 1.0), (1, 1))
    found = anchored(targets, {2: old}, {2: 10.0})
    assert found.deltas[2].tolist() == [[9.0, 0.0], [0.0, 0.0]]
    assert (found.values[2] - residual).tolist() == [[9.0, 0.0], [0.0, 0.0]]


@pytest.mark.parametrize("site", ["spread", "joint"])
def test_norm_anchor_in_the_pipeline_gives_every_value_the_pilots_norm(model, site):
    config = resolved("memit", targets=site, stabilisers=("norm-anchor",))
    place = "down_proj" if site == "joint" else "block"
    norms = pilot_norms(model, CONTEXTS, place, config, quiet)
    assert set(norms) == (set(LAYERS) if site == "joint" else {2}) and min(norms.values()) > 0
    anchors = {layer: 1.1 * norm for layer, norm in norms.items()}
    batch = Batch(model, REQUESTS, CONTEXTS, config, stats=stats_of(model), anchors=anchors)
    result = compute_updates(methods.get("memit"), batch)
    outputs = mlp_outputs(model, REQUESTS, CONTEXTS, result.targets)
    for layer, norm in norms.items():
        found = (outputs[layer] + result.targets.deltas[layer]).norm(dim=1)
        torch.testing.assert_close(found, torch.full_like(found, 1.1 * norm), rtol=1e-4, atol=0)


def test_mlp_outputs_are_what_the_down_projection_writes_at_the_subject(model):
    targets = edit(model, "memit", targets="spread").targets
    found = mlp_outputs(model, REQUESTS, CONTEXTS, targets)[2]
    ids = model.encoder.encode(REQUESTS[0].text)
    at = model.encoder.subject_last_index(REQUESTS[0].text, REQUESTS[0].subject_end)
    seen = []
    handle = model.layout.layers[2].down_proj.register_forward_hook(
        lambda _m, _i, out: seen.append(out[0, at])
    )
    with torch.no_grad():
        model.model(torch.tensor([ids]))
    handle.remove()
    torch.testing.assert_close(found[0], seen[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "name", [n for n in stabilisers.names() if n not in ("norm-anchor", "hse", "encore")]
)
def test_every_stabiliser_changes_what_is_written(name, model):
    for layer in LAYERS:
        model.unedited[MatrixPlace(layer)] = (
            DownProjection(model.layout.layers[layer].down_proj).read().clone()
        )
    settings = {"steps": 12, "lr": 1.0, "clamp": 30.0, "stop_loss": 0.0}
    plain = edit(model, "memit", REQUESTS, ("",), **settings)
    other = edit(model, "memit", REQUESTS, ("",), stabilisers=(name,), **settings)
    assert not torch.equal(plain.updates[0].delta, other.updates[0].delta)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"method": "memit", "stabilisers": "spere"}, "unknown stabiliser 'spere'; did you mean 'sphere'"),
        ({"method": "memit", "stabilisers": "rect, rect"}, "'rect' is in force twice"),
        ({"method": "rect", "stabilisers": "rect"}, "'rect' is in force twice with method 'rect'"),
        ({"method": "memit", "stabilisers": "hse"}, "'hse' weighs the keys.*'memit' keeps none"),
        ({"method": "nmke-linear", "stabilisers": "revive"}, "'revive' spreads an update.*mask 'entropy'"),
        ({"method": "alphaedit", "layers": (2,), "stabilisers": "blue"}, "'blue' needs 2 layers, 1 asked"),
    ],
)
def test_what_does_not_go_together_is_refused(settings, problem, model):
    with pytest.raises(ConfigError, match=problem):
        resolve(EditConfig.create(**{"layers": (1, 2), **settings}), model)


def test_stabilisers_are_read_from_one_text():
    assert EditConfig.create(stabilisers="rect, sphere").stabilisers == ("rect", "sphere")
    assert EditConfig.create(stabilisers=["rect"]).stabilisers == ("rect",)
    assert EditConfig.create(stabilisers="").stabilisers == ()
