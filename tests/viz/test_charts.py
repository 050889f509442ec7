"""A run's record as figures: the right numbers in them, few points however long the run, nothing without data."""

from dataclasses import replace

import pytest
import torch
from tests.viz import pages

from nmke.viz.charts import MOST_POINTS, run_figures
from nmke.viz.figures import Figure, wilson
from nmke.viz.run_record import NeuronUse, RunRecord
from nmke.viz.stability_charts import stability_figures


def by_id(run: RunRecord) -> dict[str, Figure]:
    return {figure.id: figure for figure in run_figures(run)}


def test_share_of_facts_that_took_with_its_interval() -> None:
    took, held = by_id(pages.run(batches=3, size=5))["stream"].series
    assert took.x == (5.0, 10.0, 15.0) and took.y == (0.8, 0.8, 0.8)
    assert (took.low[0], took.high[0]) == wilson(4, 5)
    assert held.x == (10.0, 15.0), "nothing is retained before the second batch"
    assert held.low[0] == pytest.approx(wilson(19, 20)[0])


def test_probabilities_leave_out_facts_that_were_known() -> None:
    before, after = by_id(pages.run(batches=2, size=5))["probability"].series
    assert before.x == after.x == tuple(float(n) for n in range(2, 11))
    assert set(before.y) == {0.01} and set(after.y) == {0.9, 0.3}


def test_health_curves_drift_and_time() -> None:
    figures = by_id(pages.run(batches=4, size=5))
    assert figures["kl"].series[0].y == pytest.approx((0.1, 0.2, 0.3, 0.4))
    assert [series.name for series in figures["kl"].series] == ["edited model", "warning limit"]
    assert figures["perplexity"].series[1].y == (118.5,)
    assert [series.name for series in figures["drift"].series] == ["layer 4", "layer 5", "layer 6"]
    assert figures["drift"].series[0].y[3] == pytest.approx(0.08)
    stages = {series.name: series.y for series in figures["seconds"].series}
    assert stages["targets"][0] == pytest.approx(1.0), "four facts of the first batch were written"
    assert "attribution" not in stages, "a stage that took no time is left out"


def test_neurons_by_layer_add_up_to_those_kept() -> None:
    figure = by_id(pages.run())["neurons"]
    assert [series.name for series in figure.series] == [
        "general only",
        "general and specific",
        "specific only",
    ]
    assert [series.y[0] for series in figure.series] == [20 / 64, 10 / 64, 10 / 64]
    assert sum(series.y[0] for series in figure.series) == 40 / 64
    assert figure.x.categories == ("4", "5", "6")


def test_neuron_use_counts_batches_and_compares_with_chance() -> None:
    run = replace(pages.run(batches=2), use={4: NeuronUse(torch.tensor([0, 1, 1, 2]), 2)})
    figure = by_id(run)["neuron-use"]
    assert figure.heat is not None and figure.x.categories == ("0", "1", "2")
    assert figure.heat.values[0] == (0.25, 0.5, 0.25)
    assert figure.heat.values[1] == pytest.approx((0.25, 0.5, 0.25)), "half chosen twice at random"
    assert figure.y.categories == ("4", "chance")


def test_chance_adds_up_to_one_for_long_runs() -> None:
    run = replace(pages.run(), use={4: NeuronUse(torch.arange(64) * 30, 2000)})
    figure = by_id(run)["neuron-use"]
    assert figure.heat is not None and len(figure.x.categories) <= 6
    for row in figure.heat.values:
        assert sum(v for v in row if v is not None) == pytest.approx(1.0)


def test_scores_of_the_newest_state_and_over_the_stream() -> None:
    run = pages.run(batches=3)
    scored = replace(
        run, scores=(pages.scores(run.batches[0].event.hash_after, 1.0), pages.scores(run.content_hash, 0.7))
    )
    now = by_id(scored)["scores"]
    assert now.y.categories == ("reliability", "locality")
    assert now.series[0].x == (0.7, 0.8) and now.series[0].low[0] == pytest.approx(0.6)
    stream = by_id(scored)["score-stream"].series[0]
    assert (stream.x, stream.y) == ((5.0, 15.0), (1.0, 0.7))
    assert "score-stream" not in by_id(replace(run, scores=scored.scores[1:])), "one point is no curve"
    lost = replace(run, scores=(pages.scores("0" * 63 + "9"),))
    assert "scores" not in by_id(lost), "scores of a state that was taken back are not shown"


def test_a_run_without_masks_or_health_has_fewer_figures() -> None:
    run = pages.run(masks=False)
    assert "neurons" not in by_id(run) and "neuron-use" not in by_id(run)
    assert run_figures(replace(run, batches=(), held=())) == []


def test_a_mask_for_each_edit_shows_one_edit_and_what_the_others_add() -> None:
    run = pages.run()
    for batch in run.batches:
        for layer in pages.LAYERS:
            mask = {"edit_entropy": 0.9, "kept_per_edit": 8.0, "kept": 40.0, "d_mlp": 64.0}
            batch.event.body["masks"][str(layer)] = mask
    one, others = by_id(run)["neurons"].series
    assert (one.y[0], others.y[0]) == (8 / 64, 32 / 64), "stacked, they end at what the whole batch writes"


def test_a_random_mask_shows_what_was_kept_and_no_parts() -> None:
    run = pages.run()
    for batch in run.batches:
        batch.event.body["config"]["mask"] = "random"
    figure = by_id(run)["neurons"]
    assert [series.name for series in figure.series] == ["chosen by mask 'random'"]
    assert figure.series[0].y[0] == 40 / 64


def test_long_runs_have_few_points() -> None:
    for figure in run_figures(pages.run(batches=700, size=2)):
        for series in figure.series:
            assert len(series.x) <= max(400, MOST_POINTS)
    took = by_id(pages.run(batches=700, size=5))["stream"].series[0]
    assert took.x[-1] == 3500.0 and took.y[0] == pytest.approx(0.8)


def test_stability_figures_show_what_was_measured() -> None:
    figures = {figure.id: figure for figure in stability_figures(pages.stability())}
    assert list(figures) == ["column-norms", "cosines", "spectrum", "columns"]
    assert figures["column-norms"].series[0].y[0] == pytest.approx(0.02)
    spectrum = figures["spectrum"].series[0]
    assert spectrum.x == (1.0, 3.0, 5.0) and spectrum.y == pytest.approx((1.1, 1.0, 1.2))
    assert figures["columns"].series[0].x_to == (0.5, 1.0)
    assert stability_figures({}) == stability_figures({"layers": {}}) == []
