"""The records that travel between modules: what they refuse and what they derive."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nmke.errors import RequestError
from nmke.types import EditRequest, LayerUpdate, NeuronMask


@given(st.text(max_size=20), st.text(max_size=20), st.text(min_size=1, max_size=20))
def test_subject_stands_where_the_slot_was(before: str, after: str, subject: str):
    if "{}" in before + "|" + after or not subject.strip() or (before + "{}" + after).count("{}") != 1:
        return
    request = EditRequest(before + "{}" + after, subject, "Rome")
    assert request.text == before + subject + after
    assert request.text[: request.subject_end] == before + subject


def test_braces_in_subject_and_prompt_are_plain_text():
    request = EditRequest("In {x: {}} the key {y} of {", "a{}b", "{z}")
    assert request.text == "In {x: a{}b} the key {y} of {"
    assert request.text[: request.subject_end].endswith("a{}b")


@pytest.mark.parametrize("prompt, count", [("The capital is", 0), ("{} and {}", 2), ("", 0)])
def test_a_prompt_without_exactly_one_slot_is_refused(prompt, count):
    with pytest.raises(
        RequestError, match=rf"has {count} subject slots '{{}}'; write the prompt with exactly one"
    ):
        EditRequest(prompt, "France", "Rome")


@pytest.mark.parametrize("blank", ["", "  ", "\n"])
def test_blank_subjects_and_targets_are_refused(blank):
    with pytest.raises(RequestError, match=r"subject of prompt 'The capital of \{\} is' is empty"):
        EditRequest("The capital of {} is", blank, "Rome")
    with pytest.raises(RequestError, match=r"target_new of prompt 'The capital of France is' is empty"):
        EditRequest("The capital of {} is", "France", blank)


def test_ids_follow_the_content_and_a_given_one_stays():
    first = EditRequest("The capital of {} is", "France", "Rome")
    assert first.id == EditRequest("The capital of {} is", "France", "Rome", relation="capital").id
    assert first.id.startswith("e") and len(first.id) == 9
    others = {
        EditRequest("The capital of {} is", "France", "Lyon").id,
        EditRequest("The capital of {} is", "Italy", "Rome").id,
        EditRequest("The seat of {} is", "France", "Rome").id,
    }
    assert len(others | {first.id}) == 4
    assert EditRequest("The capital of {} is", "France", "Rome", id="mine").id == "mine"


def test_fact_key_is_the_question_whatever_the_answer_and_spelling():
    first = EditRequest("The capital of {} is", "France", "Rome")
    assert first.fact_key == EditRequest("the  capital of {} is ", "FRANCE", "Lyon").fact_key
    assert first.fact_key != EditRequest("The capital of {} is", "Italy", "Rome").fact_key


def test_mask_counts():
    mask = NeuronMask(torch.tensor([True, False, True, True]))
    assert (mask.count, mask.ratio, mask.detail) == (3, 0.75, {})


def test_update_is_the_product_and_knows_its_columns():
    left, right = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 3.0]])
    update = LayerUpdate(4, left, right)
    assert torch.equal(update.delta, torch.tensor([[0.0, 1.0, 6.0]]))
    assert update.columns.tolist() == [False, True, True]
    assert update.mask is None


def test_records_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        EditRequest("{} is", "a", "b").subject = "c"  # type: ignore[misc]
