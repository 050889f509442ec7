"""The default model itself: general ability where it is known to be above chance, and perplexity."""

from collections.abc import Iterator

import pytest

from nmke.evaluation.ability import ability_tasks, measure
from nmke.evaluation.held_out import FILES, wikitext
from nmke.facts import data_path
from nmke.models.load import EditableModel, load_model

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def model() -> Iterator[EditableModel]:
    yield load_model("smollm2-135m")


@pytest.mark.parametrize(
    ("name", "low", "high"), [("lambada", 0.15, 0.6), ("arc_easy", 0.33, 0.8), ("piqa", 0.53, 0.85)]
)
def test_tasks_stand_where_such_a_model_stands(
    model: EditableModel, name: str, low: float, high: float
) -> None:
    if ability_tasks.get(name).find() is None:
        pytest.skip(f"no data file of {name} is in NMKE_DATA or ../shared/data")
    found = measure(model, name, limit=40)
    first = next(iter(found.metrics.values()))
    assert low < first.mean < high and found.n == 40


def test_perplexity_on_held_out_text(model: EditableModel) -> None:
    if all(data_path(name) is None for name in FILES):
        pytest.skip("WikiText-2 test is neither in NMKE_DATA nor in ../shared/data")
    assert 15.0 < wikitext(model, limit=6).metrics["perplexity"].mean < 60.0
