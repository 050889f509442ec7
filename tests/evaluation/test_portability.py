"""Questions that follow from edits: scored like a slow literal implementation, one prompt at a time."""

from typing import Any

import pytest
import torch
from tests.tiny import tiny_llama, tiny_tokenizer

from nmke.evaluation.base_outputs import collect_base
from nmke.evaluation.metrics import contains_answer, cut_answer
from nmke.evaluation.portability import score_cases
from nmke.evaluation.protocols import PROTOCOLS, score
from nmke.models.load import EditableModel
from nmke.types import EditCase, EditRequest, Neighbor, Question

FIRST = EditRequest("The capital of {} is", "France", "Tokyo", id="a-1", target_true="Paris")
BACK = EditRequest("The capital of {} is", "France", "Paris", id="a-2", target_true="Paris")
OTHER = EditRequest(
    "The author of {} is", "Emma", "Cook", id="b", neighborhood=(Neighbor("The capital of Italy is", "Rome"),)
)
CASES = (
    EditCase(
        (FIRST, BACK),
        "a",
        (
            Question(
                "multi_hop", "The train to the capital of France goes to", ("Paris", "Lutetia"), "Tokyo"
            ),
            Question("multi_hop", "You walked to the harbour of", ("old Tokyo",)),
            Question("conflict", "The capital of Italy is", ("Rome",), "Paris"),
        ),
    ),
    EditCase((OTHER,), questions=(Question("reversal", "Cook wrote", ("Emma",)),)),
    EditCase((EditRequest("{} spoke", "Marie Curie", "Polish", id="c"),)),
)


@pytest.fixture(scope="module")
def model() -> EditableModel:
    return EditableModel.wrap(tiny_llama(len(tiny_tokenizer())), tiny_tokenizer())


@torch.no_grad()
def literal(model: EditableModel, prompt: str, target: str) -> tuple[float, float]:
    """Token accuracy and mean loss from one unpadded forward pass."""
    before, after = model.encoder.encode(prompt), model.encoder.encode_target(prompt, target)
    rows = model.model(input_ids=torch.tensor([before + after])).logits[0].double().log_softmax(dim=-1)
    picked = [rows[len(before) - 1 + i] for i in range(len(after))]
    hits = [int(row.argmax()) == token for row, token in zip(picked, after, strict=True)]
    losses = [-float(row[token]) for row, token in zip(picked, after, strict=True)]
    return sum(hits) / len(hits), sum(losses) / len(losses)


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def test_scores_equal_the_literal_ones(model: EditableModel) -> None:
    found = score_cases(model, CASES, protocols=tuple(PROTOCOLS)).to_json()
    hops, single = CASES[0].questions, CASES[1].questions[0]
    shares = [literal(model, q.prompt, q.answers[0])[0] for q in hops]
    forced = found["teacher_forced"]
    assert forced["portability"] == pytest.approx(
        mean([mean(shares), literal(model, single.prompt, "Emma")[0]])
    )
    assert forced["portability_multi_hop"] == pytest.approx(mean(shares[:2]))
    assert forced["counts"]["portability"] == 4 and forced["counts"]["portability_conflict"] == 1
    wins = [
        float(literal(model, q.prompt, q.answers[0])[1] < literal(model, q.prompt, q.rival or "")[1])
        for q in (hops[0], hops[2])
    ]
    assert found["likelihood"]["portability"] == pytest.approx(mean(wins))
    assert found["likelihood"]["counts"]["portability"] == 2
    assert "portability_reversal" not in found["likelihood"]
    text = model.generate([hops[0].prompt], 16, stop_at_newline=True)[0]
    held = any(contains_answer(cut_answer(text, answer), answer) for answer in hops[0].answers)
    rows = score_cases(model, CASES, protocols=("generation",)).rows
    assert rows[0].values["generation"]["portability_contains"][0] == float(held)


def test_any_right_answer_counts_in_a_generation(
    model: EditableModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def said(self: EditableModel, prompts: list[str], *_: Any, **__: Any) -> list[str]:
        return [" Lutetia. It is old" if "train" in prompt else " nothing" for prompt in prompts]

    monkeypatch.setattr(EditableModel, "generate", said)
    found = score_cases(model, CASES, protocols=("generation",)).to_json()["generation"]
    assert found["portability_multi_hop_exact_match"] == 0.5
    assert found["portability_multi_hop_contains"] == 0.5
    assert found["portability_reversal_exact_match"] == 0.0


def test_only_the_last_edit_of_a_fact_is_scored(model: EditableModel) -> None:
    table = score_cases(model, CASES, collect_base(model, [BACK, OTHER]))
    assert [row.id for row in table.rows] == ["a-2", "b", "c"]
    assert table.protocols["teacher_forced"].n == 3
    assert "portability" in table.rows[0].values["teacher_forced"]


def test_cases_without_questions_score_as_plain_facts(model: EditableModel) -> None:
    plain = [EditCase((OTHER,)), CASES[2]]
    base = collect_base(model, [OTHER])
    requests = [OTHER, *CASES[2].requests]
    assert score_cases(model, plain, base, tuple(PROTOCOLS)) == score(model, requests, base, tuple(PROTOCOLS))


def test_same_seed_same_numbers(model: EditableModel) -> None:
    first, second = (score_cases(model, CASES, protocols=tuple(PROTOCOLS), seed=3) for _ in range(2))
    assert first == second
