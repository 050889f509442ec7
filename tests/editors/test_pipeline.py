"""The loop from requests to updates: what it promises for every method, and its arithmetic written out."""

import copy
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import pytest
import torch
from tests import tiny
from tests.exact import exact
from tests.tiers import sampled
from torch import Tensor

from nmke.config import EditConfig
from nmke.editors import methods
from nmke.editors.keys import KeyPass
from nmke.editors.known_targets import given
from nmke.editors.memory import SolverState
from nmke.editors.method import Batch, Method
from nmke.editors.pipeline import (
    BatchResult,
    ProvisionalWrites,
    Stopwatch,
    choose_neurons,
    compute_updates,
    default_layers,
    target_site,
)
from nmke.errors import NumericsError
from nmke.models.load import EditableModel
from nmke.models.weights import DownProjection
from nmke.stats.covariance import KeyCovariance, LayerStats
from nmke.stats.store import add_windows
from nmke.types import EditRequest, LayerUpdate, MatrixPlace

CONTEXTS = ("", "I was late. ", "The train had left. ")
REQUESTS = (
    EditRequest("The capital of {} is", "France", "Rome", id="a"),
    EditRequest("The mother tongue of {} is", "Marie Curie", "English", id="b"),
    EditRequest("{} was born in the old city of", "Ada Lovelace", "Tokyo", id="c"),
)
LAYERS = (1, 2)
QUICK = {
    "steps": 2,
    "lr": 0.5,
    "clamp": 3.0,
    "weight_decay": 0.01,
    "null_space": "share",
    "null_space_value": 0.6,
}
BUILDERS = {
    "llama": lambda: exact(tiny.tiny_llama, num_hidden_layers=4),
    "gpt2": lambda: exact(tiny.tiny_gpt2, n_layer=4),
    "gemma3": lambda: exact(tiny.tiny_gemma3, num_hidden_layers=4),
    "opt": lambda: exact(tiny.tiny_opt, num_hidden_layers=4),
}
SOLVERS = [name for name in methods.names() if methods.get(name).solver is not None]
FIRST = ("alphaedit", "memit", "memit-memory", "nmke-linear", "nmke-published", "rome")
MASKED = ("entropy", "random", "general", "specific", "overlap", "fixed")


@pytest.fixture
def model() -> EditableModel:
    return BUILDERS["llama"]()


def stats_of(model: EditableModel, layers: Sequence[int] = LAYERS) -> dict[int, LayerStats]:
    totals = {layer: KeyCovariance.empty(model.layout.layers[layer].d_mlp) for layer in layers}
    add_windows(model, totals, [model.encoder.encode(text) for text in tiny.SENTENCES])
    return {layer: LayerStats(total.moment, "share", 0.6) for layer, total in totals.items()}


def resolved(name: str, **settings: object) -> EditConfig:
    method = methods.get(name)
    layers = LAYERS[: method.max_layers]
    config = EditConfig.create(**{"layers": layers, **QUICK, "covariance_weight": 0.1, **settings})
    return method.fill(config)


def edit(
    model: EditableModel,
    name: str,
    requests: Sequence[EditRequest] = REQUESTS,
    contexts: Sequence[str] = CONTEXTS,
    **settings: object,
) -> BatchResult:
    config = resolved(name, **settings)
    method = methods.get(name)
    stats = stats_of(model, config.layers)
    return compute_updates(method, Batch(model, requests[: method.max_batch], contexts, config, stats=stats))


def snapshot(model: EditableModel) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.model.state_dict().items()}


def assert_untouched(model: EditableModel, before: Mapping[str, Tensor]) -> None:
    after = model.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any(each._forward_hooks or each._forward_pre_hooks for each in model.model.modules())


def write(model: EditableModel, updates: Sequence[LayerUpdate]) -> None:
    for update in updates:
        DownProjection(model.layout.layers[update.layer].down_proj).add(update.left, update.right)


def log_likelihood(model: EditableModel, request: EditRequest) -> float:
    """Mean log-probability of the answer's tokens after the bare prompt."""
    ids, target = (
        model.encoder.encode(request.text),
        model.encoder.encode_target(request.text, request.target_new),
    )
    with torch.no_grad():
        log_p = torch.log_softmax(
            model.model(torch.tensor([[*ids, *target[:-1]]])).logits[0, len(ids) - 1 :], 1
        )
    return float(log_p.gather(1, torch.tensor(target)[:, None]).mean())


@pytest.mark.parametrize(
    ("family", "name"), [(f, n) for f in BUILDERS for n in (SOLVERS if f == "llama" else FIRST)]
)
def test_every_method_leaves_the_model_alone_and_raises_the_answers_probability(name, family):
    model = BUILDERS[family]()
    before = snapshot(model)
    # One edit in one context: in a model with random weights the keys of others are in its way. The papers' ridge is
    # much for keys of this size, and masking after the solve loses what the masked neurons would have written.
    settings = {"l2": 0.01, "steps": 12, "clamp": 5.0, "null_space_value": 0.8}
    settings |= {"mask": "random", "ratio": 0.9} if name == "nmke-published" else {}
    result = edit(model, name, REQUESTS[:1], ("",), **settings)
    assert_untouched(model, before)
    requests = REQUESTS[:1]
    config = resolved(name)
    assert tuple(update.layer for update in result.updates) == config.layers
    was = [log_likelihood(model, request) for request in requests]
    write(model, result.updates)
    now = [log_likelihood(model, request) for request in requests]
    assert now[0] > was[0] + 0.05
    assert set(result.seconds) == {"targets", "attribution", "keys", "solve"}
    for layer in config.layers:  # keys for the memory are those of the edited model
        keys, _ = KeyPass(model, requests, ("",), config.layers).collect()
        torch.testing.assert_close(result.memory_keys[layer].double(), keys[layer], rtol=1e-5, atol=1e-5)


PRECISIONS = itertools.product(SOLVERS, (torch.float32, torch.bfloat16))


@pytest.mark.parametrize(("name", "dtype"), sampled(PRECISIONS, lambda one: one[0] in FIRST[1:5]), ids=str)
def test_bits_are_restored_in_every_precision(name, dtype, tokenizer):
    model = EditableModel.wrap(tiny.tiny_llama(len(tokenizer)).to(dtype), tokenizer)
    before = snapshot(model)
    result = edit(model, name, layers=(0,), steps=2)
    assert_untouched(model, before)
    assert result.updates[0].right.any()


def literal_spread(
    model: EditableModel,
    stats: Mapping[int, LayerStats],
    result: BatchResult,
    share: Callable[[float], float] = float,
) -> list[Tensor]:
    """Spread residuals with MEMIT's closed form, writing for good into a copy layer by layer."""
    scratch = copy.deepcopy(model.model)
    own = EditableModel.wrap(scratch, model.tokenizer)
    wanted = result.targets.values[LAYERS[-1]]
    written = []
    for position, layer in enumerate(LAYERS):
        keys, current = KeyPass(own, REQUESTS, CONTEXTS, LAYERS).collect()
        k = keys[layer].T  # [m B]
        residual = (wanted - current).T / share(len(LAYERS) - position)  # [d B]
        update = (torch.linalg.inv(0.1 * stats[layer].moment + k @ k.T) @ k @ residual.T).T
        DownProjection(own.layout.layers[layer].down_proj).read().add_(update)
        written.append(update)
    return written


def test_spread_targets_write_layer_by_layer_as_the_formula_says(model):
    stats = stats_of(model)
    result = edit(model, "memit", targets="spread")
    assert result.targets.site == "block" and result.targets.layers == (2,)
    for update, expected in zip(result.updates, literal_spread(model, stats, result), strict=True):
        torch.testing.assert_close(update.delta.double(), expected, rtol=1e-3, atol=1e-5)


def test_pmet_divides_by_the_square_root_of_the_layers_left(model):
    stats = stats_of(model)
    result = edit(model, "pmet", targets="spread")
    expected = literal_spread(model, stats, result, share=math.sqrt)
    for update, wanted in zip(result.updates, expected, strict=True):
        torch.testing.assert_close(update.delta.double(), wanted, rtol=1e-3, atol=1e-5)
    assert not torch.allclose(expected[0], literal_spread(model, stats, result)[0], rtol=0.1)


def test_r_rome_gives_the_mean_key_the_value_that_was_found_for_the_bare_prompt(model):
    request, layer = REQUESTS[:1], LAYERS[0]
    result = edit(model, "r-rome", request)
    weight = DownProjection(model.layout.layers[layer].down_proj).read().clone()
    keys, _ = KeyPass(model, request, CONTEXTS, (layer,)).collect()
    bare, _ = KeyPass(model, request, CONTEXTS[:1], (layer,)).collect()
    assert not torch.allclose(keys[layer], bare[layer], rtol=0.01)
    wanted = weight @ bare[layer][0] + result.targets.deltas[layer][0]  # v*
    reached = (weight + result.updates[0].delta) @ keys[layer][0]
    torch.testing.assert_close(reached, wanted.double(), rtol=1e-5, atol=1e-5)


def test_nse_finds_its_values_on_the_unedited_weights(model):
    fresh = {name: edit(model, name, REQUESTS[:2], targets="spread") for name in ("nse", "memit")}
    for layer in LAYERS:
        model.unedited[MatrixPlace(layer)] = (
            DownProjection(model.layout.layers[layer].down_proj).read().clone()
        )
    write(model, edit(model, "memit", REQUESTS[2:], clamp=8.0, steps=8).updates)
    edited = snapshot(model)
    later = {name: edit(model, name, REQUESTS[:2], targets="spread") for name in ("nse", "memit")}
    assert_untouched(model, edited)
    same = {n: torch.equal(later[n].targets.values[2], fresh[n].targets.values[2]) for n in fresh}
    assert same == {"nse": True, "memit": False}


def test_joint_targets_solve_each_layer_for_its_own_delta(model):
    stats = stats_of(model)
    result = edit(model, "memit", targets="joint")
    assert result.targets.site == "down_proj" and result.targets.layers == LAYERS
    keys, _ = KeyPass(model, REQUESTS, CONTEXTS, LAYERS).collect(result.targets.deltas)
    for update, layer in zip(result.updates, LAYERS, strict=True):
        k = keys[layer].T
        residual = result.targets.deltas[layer].double()
        expected = (torch.linalg.inv(0.1 * stats[layer].moment + k @ k.T) @ k @ residual).T
        torch.testing.assert_close(update.delta.double(), expected, rtol=1e-3, atol=1e-5)


def test_targets_go_where_the_architecture_lets_them():
    llama, gemma = BUILDERS["llama"](), BUILDERS["gemma3"]()
    assert target_site(llama, EditConfig.create(), LAYERS) == "block"
    assert target_site(gemma, EditConfig.create(), LAYERS) == "down_proj"
    assert target_site(llama, EditConfig.create(targets="joint"), LAYERS) == "down_proj"
    assert target_site(gemma, EditConfig.create(targets="spread"), LAYERS) == "block"


MASKS = itertools.product(("nmke-linear", "nmke-published", "memit", "alphaedit"), MASKED)


@pytest.mark.parametrize(
    ("name", "mask"), sampled(MASKS, lambda one: one[0] == "nmke-linear" or one[1] in ("entropy", "random"))
)
def test_unselected_columns_stay_bit_identical(name, mask, model):
    before = {layer: DownProjection(model.layout.layers[layer].down_proj).read().clone() for layer in LAYERS}
    result = edit(model, name, mask=mask)
    write(model, result.updates)
    for update in result.updates:
        keep = result.masks[update.layer].keep
        assert update.mask is result.masks[update.layer]
        assert 0 < keep.sum() < len(keep)
        assert not update.right[:, ~keep].any() and not update.delta[:, ~keep].any()
        after = DownProjection(model.layout.layers[update.layer].down_proj).read()
        changed = (after != before[update.layer]).any(dim=0)
        assert torch.equal(changed, keep)
        assert torch.equal(update.columns, keep)


def test_nmke_with_every_neuron_equals_memit_with_memory(model):
    state = SolverState().remember({layer: torch.randn(5, 64) for layer in LAYERS})
    stats = stats_of(model)
    results = []
    for name, settings in (
        ("memit-memory", {"l2": 1.0}),
        ("nmke-linear", {"mask": "random", "ratio": 1.0, "mask_scope": "batch"}),
    ):
        config = resolved(name, **settings)
        batch = Batch(model, REQUESTS, CONTEXTS, config, stats=stats, state=state)
        results.append(compute_updates(methods.get(name), batch))
    free, masked = results
    assert masked.masks[1].ratio == 1.0 and not free.masks
    for a, b in zip(free.updates, masked.updates, strict=True):
        assert torch.equal(a.left, b.left) and torch.equal(a.right, b.right)


def test_nmke_published_with_every_neuron_equals_alphaedit(model):
    free = edit(model, "alphaedit")
    masked = edit(model, "nmke-published", mask="random", ratio=1.0)
    for a, b in zip(free.updates, masked.updates, strict=True):
        assert torch.equal(a.left, b.left) and torch.equal(a.right, b.right)


def test_targets_found_before_give_the_same_updates(model):
    first = edit(model, "nmke-linear")
    known = Batch(
        model,
        REQUESTS,
        CONTEXTS,
        resolved("nmke-linear"),
        stats=stats_of(model),
        find_targets=given(first.targets),
    )
    again = compute_updates(methods.get("nmke-linear"), known)
    assert again.targets is first.targets
    assert again.seconds["targets"] >= first.targets.seconds  # as when they were sought
    for a, b in zip(first.updates, again.updates, strict=True):
        assert torch.equal(a.left, b.left) and torch.equal(a.right, b.right)


def test_either_placement_works_for_either_registered_nmke(model):
    inside, after = (
        edit(model, name, placement=placement)
        for name, placement in (("nmke-published", "in-solve"), ("nmke-linear", "after-solve"))
    )
    assert all(update.right.any() for result in (inside, after) for update in result.updates)


@pytest.mark.parametrize("name", sampled(SOLVERS, FIRST.__contains__))
def test_a_one_token_subject_at_the_start_of_the_bare_prompt_is_edited(name, model):
    request = EditRequest("{} was late, therefore", "I", "Rome", id="first token")
    before = snapshot(model)
    settings = {"mask": "random", "ratio": 0.9} if name == "nmke-published" else {}
    result = edit(model, name, [request], l2=0.01, steps=12, clamp=5.0, null_space_value=0.8, **settings)
    assert_untouched(model, before)
    assert result.owners == (0, 0)
    assert all(len(keys) == 2 for keys in result.memory_keys.values())
    was = log_likelihood(model, request)
    write(model, result.updates)
    assert log_likelihood(model, request) > was + 0.02


def test_earlier_edits_enter_the_system_of_methods_that_remember(model):
    stats = stats_of(model)
    past = SolverState().remember(edit(model, "memit").memory_keys)
    for name in SOLVERS:
        method, config = methods.get(name), resolved(name)
        requests = REQUESTS[: method.max_batch]
        fresh, later = (
            compute_updates(method, Batch(model, requests, CONTEXTS, config, stats=stats, state=state))
            for state in (SolverState(), past)
        )
        same = torch.equal(fresh.updates[0].right, later.updates[0].right)
        assert same is not method.remembers


def test_a_second_model_in_the_process_changes_nothing():
    first, second = BUILDERS["llama"](), BUILDERS["gpt2"]()
    alone = edit(first, "nmke-linear")
    edit(second, "nmke-linear")
    write(second, edit(second, "alphaedit").updates)
    again = edit(first, "nmke-linear")
    for a, b in zip(alone.updates, again.updates, strict=True):
        assert torch.equal(a.left, b.left) and torch.equal(a.right, b.right)
        assert torch.equal(a.mask.keep, b.mask.keep)


def test_a_system_that_cannot_be_solved_names_edits_and_layer_and_takes_writes_back(model):
    stats = stats_of(model)
    stats[2] = LayerStats(torch.full((64, 64), float("nan"), dtype=torch.float64))
    memit, batch = methods.get("memit"), Batch(model, REQUESTS, CONTEXTS, resolved("memit"), stats=stats)
    before = snapshot(model)
    with pytest.raises(NumericsError, match=r"edits a\.\.c \(3\), layer 2: .* holds NaN or infinity"):
        compute_updates(memit, batch)
    assert_untouched(model, before)
    with pytest.raises(NumericsError, match=r"edits a, layer 2: "):
        compute_updates(memit, replace(batch, requests=REQUESTS[:1]))
    assert_untouched(model, before)


def test_an_update_that_is_not_finite_is_refused(model):
    class Broken:
        def directions(self, keys, stats, memory, keep, config):
            return torch.full_like(keys, float("inf"))

    method = Method(Broken())
    with pytest.raises(NumericsError, match=r"edits a\.\.c \(3\), layer 1: the update is not finite"):
        compute_updates(method, Batch(model, REQUESTS, CONTEXTS, resolved("memit"), stats=stats_of(model)))


def test_provisional_writes_are_taken_back_in_reverse_order(model):
    before = snapshot(model)
    generator = torch.Generator().manual_seed(0)
    with ProvisionalWrites(model) as writes:
        for _ in range(3):  # the same layer, overlapping columns
            right = torch.randn(2, 64, generator=generator)
            right[:, :20] = 0
            writes.add(LayerUpdate(1, torch.randn(32, 2, generator=generator), right))
        assert not torch.equal(
            before["model.layers.1.mlp.down_proj.weight"], model.layout.layers[1].down_proj.weight
        )
    assert_untouched(model, before)


def test_random_masks_differ_between_batches_and_layers_but_not_between_runs(model):
    config = resolved("nmke-linear", mask="random", ratio=0.5, mask_scope="batch")
    first, again, later = (choose_neurons(model, REQUESTS, CONTEXTS, config, turn)[0] for turn in (0, 0, 1))
    assert torch.equal(first[1].keep, again[1].keep)
    assert not torch.equal(first[1].keep, later[1].keep)
    assert not torch.equal(first[1].keep, first[2].keep)
    assert first[1].count == later[1].count == 32
    other, _ = choose_neurons(model, REQUESTS, CONTEXTS, config.model_copy(update={"seed": 5}))
    assert not torch.equal(first[1].keep, other[1].keep)


def test_no_mask_means_no_attribution(model):
    assert choose_neurons(model, REQUESTS, CONTEXTS, resolved("alphaedit")) == ({}, {})


def test_attribution_settings_reach_the_scores(model):
    plain = {"attribution": "lps", "attribution_token": "last", "mask_scope": "batch"}
    summaries = [
        choose_neurons(model, REQUESTS, CONTEXTS, resolved("nmke-linear", **{**plain, **settings}))[1][1]
        for settings in (
            {},
            {"attribution_token": "subject"},
            {"attribution_target": "new"},
            {"attribution": "psa"},
            {"attribution": "mpc"},
            {"amplification": 10.0},
        )
    ]
    assert len({tuple(summary.values()) for summary in summaries}) == len(summaries)
    assert all(0 < summary["positive"] < 1 and summary["mean"] < summary["max"] for summary in summaries)


@pytest.mark.parametrize(
    "n_layers, expected",
    [(1, (0,)), (2, (0,)), (4, (1,)), (6, (1, 2, 3, 4)), (30, (4, 5, 6, 7, 8)), (32, (4, 5, 6, 7, 8))],
)
def test_default_layers_follow_relative_depth(n_layers, expected):
    assert default_layers(n_layers) == expected


def test_default_layers_exist_and_are_never_the_last():
    for n_layers in range(2, 130):
        layers = default_layers(n_layers)
        assert layers and layers == tuple(range(layers[0], layers[-1] + 1))
        assert layers[0] >= 0 and layers[-1] < n_layers - 1 and len(layers) <= 5


def test_stopwatch_adds_up_also_when_a_stage_fails():
    clock = Stopwatch()
    with pytest.raises(ValueError, match="inside"), clock.stage("a"):
        raise ValueError("inside")
    first = clock.seconds["a"]
    with clock.stage("a"):
        pass
    assert clock.seconds["a"] >= first >= 0
