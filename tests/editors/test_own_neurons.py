"""Neurons of their own: what they write, for whom they fire, and that they are given back."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from tests import runs, tiny
from tests.exact import exact
from tests.models.families import tiny_family

from nmke.config import EditConfig
from nmke.editors import methods
from nmke.editors.free_neurons import choose_own, free_neurons, homes_of, own_layers
from nmke.editors.keys import KeyPass
from nmke.editors.memory import SolverState
from nmke.editors.method import Batch, with_defaults
from nmke.editors.nmke import OwnNeurons
from nmke.editors.pipeline import BatchResult, ProvisionalWrites, compute_updates
from nmke.errors import ConfigError, LayoutError
from nmke.models.load import EditableModel
from nmke.models.read_in import coefficients
from nmke.models.tracing import record_inputs, record_outputs
from nmke.progress import quiet
from nmke.session import EditSession
from nmke.stats.corpus import openers
from nmke.stats.covariance import KeyCovariance, LayerStats, OrdinaryInputs
from nmke.stats.store import CorpusSpec, StatsStore, add_windows
from nmke.types import EditRequest, MatrixPlace

CONTEXTS = ("", "I was late. ", "The train had left. ")
REQUESTS = (
    EditRequest("The capital of {} is", "France", "Rome", id="a"),
    EditRequest("The mother tongue of {} is", "Marie Curie", "English", id="b"),
)
OTHER = EditRequest("The author of {} is", "Emma", "Jane", id="c")
LAYERS = (1, 2)
BUILDERS = {
    "llama": lambda: exact(tiny.tiny_llama, num_hidden_layers=4),
    "gemma3": lambda: exact(tiny.tiny_gemma3, num_hidden_layers=4),
    "gpt2": lambda: exact(tiny.tiny_gpt2, n_layer=4),
}


def ordinary(model: EditableModel, layers: Sequence[int]):
    """Key statistics and input moments of a few sentences."""
    windows = [model.encoder.encode(text) for text in tiny.SENTENCES]
    keys = {i: KeyCovariance.empty(model.layout.layers[i].d_mlp) for i in layers}
    inputs = {i: KeyCovariance.empty(model.layout.d_model + 1) for i in layers}
    add_windows(model, keys, windows)
    add_windows(model, inputs, windows, "inputs")
    moments = {i: OrdinaryInputs(inputs[i].moment, inputs[i].moment) for i in layers}
    return {i: LayerStats(keys[i].moment) for i in layers}, moments


def settings(**changes: object) -> EditConfig:
    asked = {"steps": 4, "clamp": 3.0, "weight_decay": 0.01, "layers": LAYERS, **changes}
    return methods.get("nmke").fill(EditConfig.create(method="nmke", **asked))


def edit(model: EditableModel, requests: Sequence[EditRequest] = REQUESTS, **changes: object) -> BatchResult:
    config = settings(**changes)
    stats, inputs = ordinary(model, config.layers or ())
    method = methods.get("nmke")
    return compute_updates(method, Batch(model, requests, CONTEXTS, config, stats=stats, inputs=inputs))


def written_at(model: EditableModel, request: EditRequest, layer: int) -> torch.Tensor:
    """What the down-projection writes at the request's anchors, [rows, d_model]."""
    rows = KeyPass(model, [request], CONTEXTS, (layer,))
    parts = model.layout.layers[layer]
    keys = rows.at_anchors({"keys": parts.down_proj})["keys"]
    return keys @ parts.matrix("down").read().double().T


@pytest.mark.parametrize("family", BUILDERS)
def test_the_subjects_token_gets_the_delta_and_another_subject_nothing(family):
    model = BUILDERS[family]()
    as_loaded = runs.bits(model)
    result = edit(model, REQUESTS[:1], layers=(1,))
    assert runs.bits(model) == as_loaded
    (update,), delta = result.updates, result.targets.deltas[1][0].double()
    (neuron,) = update.replaced["down"].index.tolist()
    parts = model.layout.layers[1]
    own, other = written_at(model, REQUESTS[0], 1), written_at(model, OTHER, 1)
    keys = {r.id: KeyPass(model, [r], CONTEXTS, (1,)) for r in (REQUESTS[0], OTHER)}
    lost = {
        name: rows.at_anchors({"k": parts.down_proj})["k"][:, [neuron]]
        * parts.matrix("down").read()[:, neuron].double()
        for name, rows in keys.items()
    }
    with ProvisionalWrites(model) as writes:
        writes.add(update)
        change = written_at(model, REQUESTS[0], 1) - own + lost["a"]
        elsewhere = written_at(model, OTHER, 1) - other + lost["c"]
    share = change @ delta / delta.square().sum()
    torch.testing.assert_close(change, share[:, None] * delta, rtol=1e-4, atol=1e-6)
    assert float(share.max()) == pytest.approx(1.0, abs=1e-4)
    assert float(elsewhere.norm(dim=1).max()) < 0.1 * float(delta.norm())  # SiLU dips below zero by so much


@pytest.mark.parametrize("family", BUILDERS)
def test_a_neuron_is_written_for_each_fact_in_one_layer(family):
    model = BUILDERS[family]()
    result = edit(model)
    (update,) = result.updates
    assert update.layer == LAYERS[0] and result.targets.layers == LAYERS[:1]
    parts = {"up", "down"} if family == "gpt2" else {"gate", "up", "down"}
    assert set(update.replaced) == parts and update.left.shape[1] == 0
    assert int(update.columns.sum()) == 2 and torch.equal(update.mask.keep, update.columns)
    assert result.memory_keys[1].shape == (2, model.layout.layers[1].d_mlp)
    with ProvisionalWrites(model) as writes:
        writes.add(update)
        rows = KeyPass(model, REQUESTS, CONTEXTS, LAYERS[:1])
        keys = rows.at_anchors({1: model.layout.layers[1].down_proj})[1]
        fires = keys[:, update.replaced["down"].index.long()]  # [rows, edits]
        own = fires.gather(1, rows.owner[:, None])[:, 0]
        cross = fires.gather(1, 1 - rows.owner[:, None])[:, 0]
        assert float(cross.abs().max()) < 0.05 * float(own.max())


def take(model: EditableModel, layer: int, count: int) -> None:
    """Have so many neurons of a layer held by earlier edits."""
    gate = model.layout.layers[layer].matrix("gate")
    model.unedited.setdefault(MatrixPlace(layer, "gate"), gate.read().clone())
    index = free_neurons(model, layer).nonzero()[:count, 0]
    gate.restore(index, gate.columns(index) + 1.0)


def test_layers_are_filled_to_the_half_one_after_another():
    model = BUILDERS["llama"]()
    batch = batch_of(model)
    assert homes_of(batch, (0, 1, 0)) == [1, 1, 1]
    take(model, 1, 31)
    assert homes_of(batch, (0, 1, 0)) == [1, 2, 1], "a second anchor stays with its fact"
    take(model, 1, 1)
    take(model, 2, 32)
    assert homes_of(batch, (0, 1)) == [2, 2], "the last layer takes what is left"
    with ProvisionalWrites(model):
        result = methods.get("nmke").compute(batch)
    assert [update.layer for update in result.updates] == [2]


def test_a_batch_may_spread_over_two_layers():
    model = BUILDERS["llama"]()
    take(model, 1, 31)
    as_loaded = runs.bits(model)
    result = methods.get("nmke").compute(batch_of(model))
    assert runs.bits(model) == as_loaded
    assert [update.layer for update in result.updates] == [1, 2]
    assert all(int(update.columns.sum()) == 1 for update in result.updates)
    assert not result.targets.deltas[1][1].any() and not result.targets.deltas[2][0].any()
    assert result.targets.deltas[1][0].any() and result.targets.deltas[2][1].any()
    assert all(0 < p < 1 for p in result.targets.probabilities) and len(result.targets.steps) == 2


@pytest.mark.parametrize(
    ("n_layers", "layers"), [(1, (0,)), (4, (1,)), (6, (3,)), (18, (10, 11, 12)), (30, (16, 17, 18, 19, 20))]
)
def test_default_layers_lie_behind_the_middle(n_layers, layers):
    assert own_layers(n_layers) == layers


def test_directions_in_closed_form():
    generator = torch.Generator().manual_seed(0)
    text = torch.randn(4000, 5, generator=generator, dtype=torch.float64) + torch.tensor([3.0, 0, 0, 0, 0])
    with_one = torch.cat([text, torch.ones(4000, 1, dtype=torch.float64)], dim=1)
    subjects = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    method = OwnNeurons(ridge=0.0, bias_ridge=0.5, slack=0.0)
    found, constants = method.detectors(subjects, torch.eye(3), with_one.T @ with_one / 4000)
    torch.testing.assert_close((found * subjects).sum(1), torch.ones(3, dtype=torch.float64))
    system = 0.7 * text.T @ text / 4000 + 0.3 * subjects.T @ subjects / 3
    mean = 0.7 * text.mean(0) + 0.3 * subjects.mean(0)
    wanted = torch.linalg.inv(system) @ subjects.T
    torch.testing.assert_close(found.T, wanted / (wanted * subjects.T).sum(0))
    smooth = system + 0.5 * system.diagonal().mean() * torch.eye(5)
    plain = torch.linalg.inv(smooth) @ mean  # moved along each reading, so that it is 1 at the subject
    missing = 1 - subjects @ plain
    torch.testing.assert_close(constants, plain + missing[:, None] * found)


def test_subjects_of_earlier_edits_are_part_of_what_a_reading_is_told_from():
    generator = torch.Generator().manual_seed(0)
    rows, past = torch.randn(2, 3, 5, generator=generator, dtype=torch.float64)
    moment = torch.eye(6, dtype=torch.float64)
    with_one = torch.cat([past, torch.ones(3, 1, dtype=torch.float64)], dim=1)
    method = OwnNeurons(ridge=0.0, slack=0.0, earlier_weight=0.5)
    found, _ = method.detectors(rows, torch.eye(3), moment, with_one.T @ with_one)
    system = 0.7 * torch.eye(5) + 0.3 * rows.T @ rows / 3 + 0.5 * past.T @ past
    wanted = torch.linalg.inv(system) @ rows.T
    torch.testing.assert_close(found.T, wanted / (wanted * rows.T).sum(0))
    alone, _ = method.detectors(rows, torch.eye(3), moment)
    assert float((past @ found.T).square().sum()) < float((past @ alone.T).square().sum())


def test_a_reading_is_evened_out_over_the_contexts_of_a_fact():
    generator = torch.Generator().manual_seed(0)
    moment = torch.eye(9, dtype=torch.float64)
    rows = torch.randn(4, 8, generator=generator, dtype=torch.float64)
    rows[1] = 0.2 * rows[0] + 0.3 * rows[1]  # a context in which the subject looks quite different
    weights = torch.tensor([[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]], dtype=torch.float64)
    spread = []
    for slack in (0.0, 0.1, 10.0):
        found, constants = OwnNeurons(slack=slack).detectors(rows, weights, moment)
        read, ones = rows @ found.T, rows @ constants.T
        torch.testing.assert_close((weights * read.T).sum(1), torch.ones(2, dtype=torch.float64))
        spread.append(float((read[0, 0] - read[1, 0]).abs()))
        assert slack or torch.allclose(ones[weights.T > 0], torch.ones(4, dtype=torch.float64))
    assert spread[0] == pytest.approx(0.0, abs=1e-9) and spread[0] < spread[1] < spread[2]


@pytest.mark.parametrize("family", BUILDERS)
def test_a_later_neuron_is_told_from_the_subject_of_an_earlier_edit(family):
    model = BUILDERS[family]()
    first, later = REQUESTS[1], replace(REQUESTS[1], subject="Eve Curie", id="c")
    written = edit(model, [first], layers=(1,))
    assert set(written.memory_keys) == set(written.memory_inputs) == {1}
    inputs, past = written.memory_inputs[1], SolverState()
    assert inputs.shape == (1, model.layout.d_model + 1) and float(inputs[0, -1]) == 1
    heard = []
    for state in (past, past.remember(written.memory_keys, written.memory_inputs)):
        batch = replace(batch_of(model, layers=(1,)), requests=(later,), state=state)
        (update,) = OwnNeurons(earlier_weight=10.0)(batch).updates
        with ProvisionalWrites(model) as writes:
            writes.add(update)
            rows = KeyPass(model, (first, later), CONTEXTS, (1,))
            keys = rows.at_anchors({1: model.layout.layers[1].down_proj})[1]
        fires = rows.weights @ keys[:, int(update.replaced["down"].index[0])]
        heard.append(float(fires[0] / fires[1]))
    assert abs(heard[1]) < 0.5 * abs(heard[0]), heard


def test_what_every_layer_is_given_is_remembered_as_it_is_after_the_write():
    model = BUILDERS["llama"]()
    result = edit(model)
    assert list(result.memory_keys) == [1] and list(result.memory_inputs) == [1, 2]
    with ProvisionalWrites(model) as writes:
        writes.add(result.updates[0])
        rows = KeyPass(model, REQUESTS, CONTEXTS, LAYERS)
        seen = rows.at_anchors({i: model.layout.layers[i].read_in.behind_activation for i in LAYERS})
    for layer, inputs in result.memory_inputs.items():
        torch.testing.assert_close(inputs[:, :-1], rows.average(seen[layer]).float())


@pytest.mark.parametrize("gated", [True, False])
def test_a_coefficient_is_flat_at_the_subject_and_nothing_below_the_threshold(gated):
    model = BUILDERS["llama" if gated else "gpt2"]()
    parts = model.layout.layers[1]
    reading = edit(model, REQUESTS[:1], layers=(1,)).updates[0]
    _, inputs = ordinary(model, (1,))
    rows = KeyPass(model, REQUESTS[:1], CONTEXTS, (1,))
    seen = rows.at_anchors({"x": parts.read_in.behind_activation})["x"]
    (u,), (c,) = OwnNeurons().detectors(seen, rows.weights, inputs[1].text)
    base = torch.linalg.lstsq(torch.stack([u, c]), torch.tensor([[0.0], [1.0]]).double()).solution[:, 0]
    step = torch.linalg.lstsq(torch.stack([u, c]), torch.tensor([[1.0], [0.0]]).double()).solution[:, 0]
    at = {s: base + s * step for s in (0.0, 0.25, 0.9, 1.0, 1.1)}
    with ProvisionalWrites(model) as writes:
        writes.add(reading)
        hidden = torch.stack(list(at.values()))[None]
        neuron = int(reading.replaced["down"].index[0])
        found = coefficients(parts.mlp, parts.down_proj, hidden)[0, :, neuron]
    read = dict(zip(at, (found / found[3]).tolist(), strict=True))
    assert abs(read[0.0]) < 0.01 and abs(read[0.25]) < 0.03
    if gated:
        assert read[0.9] == pytest.approx(0.95, abs=0.02) and read[1.1] == pytest.approx(0.95, abs=0.02)
    else:
        assert read[0.9] == pytest.approx(0.78, abs=0.02) and read[1.1] == pytest.approx(1.22, abs=0.02)


def batch_of(model: EditableModel, **changes: object) -> Batch:
    stats, inputs = ordinary(model, LAYERS)
    config = settings(**changes)
    return Batch(model, REQUESTS, CONTEXTS, config, quiet, None, stats, inputs, turn=3)


def test_the_least_used_neurons_are_taken_or_as_many_at_random():
    model = BUILDERS["llama"]()
    batch = batch_of(model)
    least, mask = choose_own(batch, 1, 3)
    weight = model.layout.layers[1].down_proj.weight.double()
    firsts = {model.encoder.encode(opener)[0] for opener in openers()}
    with record_inputs({"keys": model.layout.layers[1].down_proj}) as seen:
        model.model(torch.tensor([[first] for first in firsts]), use_cache=False)
    first = seen["keys"].reshape(len(firsts), -1).double()
    use = torch.maximum(batch.stats[1].mean_squares, first.square().mean(0)) * weight.square().sum(0)
    assert least.tolist() == use.argsort()[:3].tolist() and mask.detail["free"] == 64
    drawn = [choose_own(batch_of(model, mask="random"), 1, 3)[0].tolist() for _ in range(2)]
    assert drawn[0] == drawn[1] != least.tolist() and len(set(drawn[0])) == 3


def test_what_keeps_up_the_first_token_is_not_taken():
    model = BUILDERS["llama"]()
    batch = batch_of(model)
    (least, *_), _ = choose_own(batch, 1, 4)

    def fire_at_first(_, given):
        keys = given[0].clone()
        keys[:, 0, least] = 50.0
        return (keys,)

    with model.layout.layers[1].down_proj.register_forward_pre_hook(fire_at_first):
        seen, _ = ordinary(model, LAYERS)
        torch.testing.assert_close(seen[1].moment, batch.stats[1].moment)  # which know nothing of position 0
        index, _ = choose_own(batch, 1, 32)
    assert least not in index


def test_neurons_of_earlier_edits_are_left_alone_until_none_is_free():
    model = BUILDERS["llama"]()
    gate = model.layout.layers[1].matrix("gate")
    batch = batch_of(model)
    taken, _ = choose_own(batch, 1, 60)
    model.unedited[MatrixPlace(1, "gate")] = gate.read().clone()
    gate.restore(taken, gate.columns(taken) + 1.0)
    assert sorted(free_neurons(model, 1).nonzero().flatten().tolist()) == sorted(
        set(range(64)) - set(taken.tolist())
    )
    assert set(choose_own(batch, 1, 4)[0].tolist()).isdisjoint(taken.tolist())
    with pytest.raises(
        ConfigError,
        match=r"5 neurons of layer 1 were asked for; 4 of 64 are not held .*: edit more layers, undo",
    ):
        choose_own(batch, 1, 5)


def test_a_model_with_a_fused_gate_is_refused_before_anything_is_done():
    model = EditableModel.wrap(tiny_family("phi3"), tiny.tiny_tokenizer(64 + 256))
    batch = Batch(model, REQUESTS, CONTEXTS, settings(layers=(0,)), quiet)
    with pytest.raises(LayoutError, match="use a method that writes down-projections only"):
        OwnNeurons()(batch)


def test_batches_take_different_neurons_and_a_resumed_run_has_the_same_bits(tmp_path):
    store, facts = StatsStore(tmp_path / "stats"), runs.facts(4)
    own = {"method": "nmke", "store": store}
    with runs.open_run(tmp_path / "whole", **own) as session:
        as_loaded = runs.bits(session.model)
        hashes = [r.event.hash_after for r in runs.edit_all(session, facts)]
        assert {c.part for c in session.changed()} == {"down", "gate", "up"}
        assert all(c.columns == 4 for c in session.changed())
        assert int(free_neurons(session.model, 1).sum()) == 60
        assert runs.live_state(session).inputs[1].count == 4
        session.undo()
        assert runs.live_state(session).inputs[1].count == 2
        assert int(free_neurons(session.model, 1).sum()) == 62 and session.content_hash == hashes[0]
        session.undo()
        assert runs.bits(session.model) == as_loaded
    with runs.open_run(tmp_path / "two", **own) as session:
        runs.edit_all(session, facts[:2])
    with runs.open_run(tmp_path / "two", **own) as session:
        found = runs.edit_all(session, facts, resume=True)
        assert [r.event.hash_after for r in found] == hashes[1:]
        session.verify()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "alphaedit", "mask": "least"}, "mask 'least' does not go with method 'alphaedit'"),
        ({"method": "nmke-linear", "mask": "least"}, "mask 'least' does not go with method 'nmke-linear'"),
        ({"mask": "least", "ratio": 0.1}, "ratio 0.1 goes with mask 'random', 'least' asked"),
    ],
)
def test_settings_that_do_not_fit_are_refused(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        runs.open_run(tmp_path / "run", **{"method": "nmke", **changes})


@pytest.mark.parametrize(
    ("changes", "method", "scope"),
    [
        ({}, "nmke", "batch"),
        ({"mask": "random"}, "nmke", "batch"),
        ({"mask": "none"}, "nmke-linear", "edit"),
        ({"mask": "entropy"}, "nmke-linear", "edit"),
        ({"mask": "general"}, "nmke-linear", "batch"),
        ({"mask": "random", "ratio": 0.1}, "nmke-linear", "edit"),
        ({"attribution": "mpc"}, "nmke-linear", "edit"),
        ({"stabilisers": ("encore",)}, "nmke-linear", "edit"),
    ],
)
def test_what_only_a_solve_has_is_handed_to_the_linear_method_and_stays_there(changes, method, scope):
    filled = with_defaults(EditConfig.create(method="nmke", **changes))
    assert (filled.method, filled.mask_scope) == (method, scope)
    assert with_defaults(EditConfig.create(**filled.model_dump())) == filled


@pytest.mark.parametrize(
    ("family", "changes", "clamp"),
    [("gemma3", {}, 5.0), ("gemma3", {"clamp": 0.75}, 0.75), ("llama", {}, 0.75), ("gpt2", {}, 0.75)],
)
def test_targets_may_be_longer_where_a_norm_follows(family, changes, clamp):
    filled = with_defaults(EditConfig.create(method="nmke", **changes), BUILDERS[family]().layout)
    assert filled.clamp == clamp
    assert with_defaults(EditConfig.create(**filled.model_dump()), BUILDERS[family]().layout) == filled


def test_statistics_of_inputs_are_kept_apart_from_those_of_keys_and_have_the_first_token(tmp_path):
    store, model, spec = StatsStore(tmp_path), runs.model(), CorpusSpec(tokens=300)
    keys = store.prepare(model, (1,), spec)[1]
    assert store.missing(model, (1, 2), spec, "inputs") == [1, 2]
    found = store.prepare(model, (1,), spec, kind="inputs")[1]
    assert store.missing(model, (1, 2), spec, "inputs") == [2]
    assert keys.total.shape == (64, 64) and found.total.shape == (33, 33) and found.count > keys.count
    assert float(found.moment[-1, -1]) == 1.0
    window = model.encoder.encode(tiny.SENTENCES[0])
    moment = KeyCovariance.empty(33)
    add_windows(model, {1: moment}, [window], "inputs")
    with record_outputs({"norm": model.layout.layers[1].block.post_attention_layernorm}) as seen:
        model.model(torch.tensor([window]), use_cache=False)
    inputs = seen["norm"][0].double()  # position 0, an attention sink, is read by neurons like any other
    torch.testing.assert_close(moment.moment[:-1, -1], inputs.mean(0), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(moment.moment[:-1, :-1], inputs.T @ inputs / len(inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.model
def test_on_the_default_model_neurons_fire_for_their_subject_in_other_words_too(tmp_path):
    from nmke.facts import bundled_facts

    requests = bundled_facts()[:2]  # Kenya and Peru
    config = EditConfig.create(method="nmke", layers=(16,), health_every=0)
    with EditSession.open("smollm2-135m", tmp_path / "run", config=config, device="cpu") as session:
        model = session.model
        report = session.edit_batch(requests)
        assert [record.status for record in report.records] == ["written"] * 2

        def fires(text: str) -> float:
            """The largest coefficient that the layer's own neurons reach in the text."""
            ids = torch.tensor([model.encoder.encode(text)])
            with torch.no_grad(), record_inputs({16: model.layout.layers[16].down_proj}) as seen:
                model.model(input_ids=ids, use_cache=False)
            return float(seen[16][0][:, ~free_neurons(model, 16)].max())

        said = fires(requests[0].text)
        assert fires("If you visit the capital city of Kenya, you will be in") > 0.5 * said > 0
        assert fires("The capital city of Colombia is") < 0.4 * said  # the likest there is, and not told of
        assert fires("The capital city of Ghana is") < 0.05 * said
        assert fires("She put the kettle on and opened a book.") < 0.001 * said
        session.undo()
        assert session.content_hash == session.weights.base_hash()
