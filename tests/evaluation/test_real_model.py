"""The default model itself: an oracle prompt, and general ability where it is known to be above chance."""

from collections.abc import Iterator

import pytest

from nmke.evaluation.ability import ability_tasks, measure
from nmke.evaluation.base_outputs import collect_base
from nmke.evaluation.held_out import FILES, wikitext
from nmke.evaluation.protocols import PROTOCOLS, score
from nmke.facts import bundled_facts, data_path
from nmke.models.load import EditableModel, load_model
from nmke.types import EditRequest

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def model() -> Iterator[EditableModel]:
    yield load_model("smollm2-135m")


def told(request: EditRequest) -> EditRequest:
    """The request with the new answer told before each of its prompts."""
    fact = f"{request.text} {request.target_new}."
    return EditRequest(
        f"{fact} {fact} {request.prompt}",
        request.subject,
        request.target_new,
        request.id,
        target_true=request.target_true,
        neighborhood=request.neighborhood,
    )


def test_an_oracle_prompt_scores_1_and_leaves_the_neighbours(model: EditableModel) -> None:
    requests = [told(request) for request in bundled_facts()[:12]]
    found = score(model, requests, collect_base(model, requests), tuple(PROTOCOLS)).to_json()
    assert found["teacher_forced"]["reliability"] == found["teacher_forced"]["locality"] == 1.0
    assert found["likelihood"]["efficacy"] == 1.0
    assert found["generation"]["exact_match"] == 1.0


@pytest.mark.parametrize(
    ("name", "low", "high"), [("lambada", 0.15, 0.6), ("arc_easy", 0.33, 0.8), ("piqa", 0.53, 0.85)]
)
def test_tasks_stand_where_such_a_model_stands(
    model: EditableModel, name: str, low: float, high: float
) -> None:
    if ability_tasks.get(name).find() is None:
        pytest.skip(f"no data file of {name} is in NMKE_DATA or ../shared/data")
    found = measure(model, name, limit=60)
    first = next(iter(found.metrics.values()))
    assert low < first.mean < high and found.n == 60


def test_perplexity_on_held_out_text(model: EditableModel) -> None:
    if all(data_path(name) is None for name in FILES):
        pytest.skip("WikiText-2 test is neither in NMKE_DATA nor in ../shared/data")
    assert 15.0 < wikitext(model, limit=6).metrics["perplexity"].mean < 60.0
