"""Surveys of every layer, and their record."""

import json

import pytest
import torch
from tests import runs

from nmke.attribution import neuron_scores
from nmke.config import EditConfig
from nmke.errors import ConfigError, RequestError
from nmke.masking.select import select_neurons
from nmke.neurons import survey
from nmke.neurons.record import UNITS, survey_record
from nmke.neurons.survey import QUICK, SLOW, by_fact, fast_metrics
from nmke.types import EditRequest

CONTEXTS = ("", "The train left. ")


def test_every_layer_is_scored_as_the_metric_scores_it():
    model, requests = runs.model(), runs.facts(3)
    found = survey(model, requests, CONTEXTS, ("mpc", "gradient"), runs.config())
    assert found.layers == (0, 1, 2, 3) and found.facts == (0, 0, 1, 1, 2, 2)
    for name in ("mpc", "gradient"):
        for layer in found.layers:
            assert torch.equal(found.scores[name][layer], neuron_scores.get(name)(found.readout, layer, 30.0))
    text = requests[1].text
    ids = model.encoder.encode(text)
    seen = []
    handle = model.layout.layers[2].down_proj.register_forward_pre_hook(
        lambda _m, a: seen.append(a[0][0, -1])
    )
    with torch.no_grad():
        model.model(torch.tensor([ids]))
    handle.remove()
    torch.testing.assert_close(found.scores["mpc"][2][2], seen[0], rtol=1e-4, atol=1e-5)


def test_bare_prompts_give_one_row_per_fact_also_for_a_subject_at_the_start():
    requests = [*runs.facts(2), EditRequest("{} is in", "of", "the", id="first")]
    found = survey(runs.model(), requests, ("",), ("mpc",), runs.config())
    assert found.facts == (0, 1, 2)
    assert found.prompts.rows[2].anchor > 0


def test_scores_of_a_fact_are_the_mean_of_its_prompts():
    scores = {0: torch.tensor([[1.0, 2.0], [3.0, 4.0], [10.0, 20.0]])}
    assert by_fact(scores, (0, 0, 1))[0].tolist() == [[2.0, 3.0], [10.0, 20.0]]


def test_subject_token_and_new_answer_are_asked_for():
    model, requests = runs.model(), runs.facts(2, "The train for {} had left")
    config = runs.config(attribution_token="subject", attribution_target="new")
    found = survey(model, requests, ("",), ("mpc",), config)
    ends = [row.anchor for row in found.prompts.rows]
    assert found.prompts.columns == tuple(ends) and all(
        end < len(row.ids) - 1 for end, row in zip(ends, found.prompts.rows, strict=True)
    )
    wanted = [model.encoder.encode_target(r.text, r.target_new)[0] for r in requests]
    assert found.readout.targets.tolist() == wanted


def test_the_old_answer_must_be_known():
    config = EditConfig.create(attribution_target="true")
    with pytest.raises(RequestError, match=r"edit 'e000'.*none is given; add `target_true`"):
        survey(runs.model(), runs.facts(1), ("",), ("mpc",), config)


def test_unknown_metric_is_refused_before_anything_runs():
    with pytest.raises(ConfigError, match="did you mean 'gradient'"):
        survey(runs.model(), runs.facts(1), ("",), ("gradiant",), runs.config())


def test_every_registered_metric_is_quick_fast_or_slow_and_has_a_unit():
    assert set(fast_metrics()) | set(SLOW) == set(neuron_scores.names()) == set(UNITS)
    assert fast_metrics()[: len(QUICK)] == QUICK


def test_record_holds_the_sets_that_an_edit_would_draw():
    model, requests, config = runs.model(), runs.facts(3), EditConfig.create()
    found = survey(model, requests, CONTEXTS, ("lps", "mpc"), config)
    record = survey_record(
        model, found, requests, config, (1,), share=0.05, shown=3, texts=["The old harbour"]
    )
    assert record["schema"] == "nmke.neurons/1" and json.loads(json.dumps(record)) == record
    assert list(record["metrics"]) == ["lps", "mpc"] and len(record["prompts"]) == 6
    for row in record["metrics"]["lps"]["layers"]:
        for kind in ("general", "specific"):
            mask = select_neurons(found.scores["lps"][row["layer"]], EditConfig.create(mask=kind))
            assert row[kind] == mask.count
            assert all(mask.keep[one["neuron"]] for one in row[f"top_{kind}"])
        union = select_neurons(found.scores["lps"][row["layer"]], EditConfig.create(mask="entropy"))
        assert row["kept"] == union.count and row["general_ratio"] == pytest.approx(
            union.detail["general_ratio"], 1e-5
        )
    wide = record["metrics"]["lps"]["over_all_layers"]
    assert sum(wide["general"]["counts"]) == wide["neurons"] == round(0.05 * 4 * 64)
    assert {kind for one in record["neurons"] for kind in one["kinds"]} == {"general", "specific"}
    assert all(one["promotes"] and one["excited_by"] for one in record["neurons"])
