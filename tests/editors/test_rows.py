"""Rows of a request, and the second anchor of a subject that is the model's first token."""

import pytest
from tests import tiny

from nmke.editors.rows import BareRequest, prompt_rows, with_second_anchors
from nmke.errors import RequestError
from nmke.models.load import EditableModel
from nmke.types import EditRequest

CONTEXTS = ("", "I was late. ", "The train had left. ")
FIRST = EditRequest("{} is a city in", "London", "Kenya", id="first")
LATER = EditRequest("The train to {} is", "London", "late", id="later")


@pytest.fixture(scope="module")
def model() -> EditableModel:
    return EditableModel.wrap(tiny.tiny_llama(), tiny.tiny_tokenizer(), name="tiny")


def one_token(model: EditableModel) -> EditRequest:
    """A request whose subject is exactly the model's first token."""
    ids = model.encoder.encode(FIRST.text)
    subject = next(FIRST.text[:n] for n in range(1, 20) if len(model.encoder.encode(FIRST.text[:n])) == 1)
    assert ids[0] == model.encoder.encode(subject)[0]
    return EditRequest("{}" + FIRST.text[len(subject) :], subject, "Kenya", id="first")


def test_a_subject_at_position_0_gets_a_second_anchor_on_its_bare_prompt(model: EditableModel) -> None:
    request = one_token(model)
    found, owners = with_second_anchors(model, [LATER, request])
    assert owners == (0, 1, 1)
    assert found[:2] == (LATER, request)
    second = found[2]
    assert isinstance(second, BareRequest)
    assert second.text == request.text and second.target_new == request.target_new
    assert second.subject.startswith(request.subject) and len(second.subject) > len(request.subject)
    rows = prompt_rows(model, second, CONTEXTS)
    assert [row.bare for row in rows] == [True] and rows[0].anchor > 0


def test_rows_at_position_0_are_left_out_and_those_with_context_remain(model: EditableModel) -> None:
    rows = prompt_rows(model, one_token(model), CONTEXTS)
    assert [row.bare for row in rows] == [False, False]
    assert all(row.anchor > 0 for row in rows)


def test_with_bos_no_second_anchor_is_needed() -> None:
    model = EditableModel.wrap(tiny.tiny_llama(), tiny.tiny_tokenizer(add_bos=True), name="tiny")
    found, owners = with_second_anchors(model, [FIRST])
    assert found == (FIRST,) and owners == (0,)


def test_a_prompt_longer_than_the_model_is_refused(model: EditableModel) -> None:
    limit = model.context_length
    assert limit is not None
    request = EditRequest("The train " + "was very late and " * limit + "{} is", "London", "late", id="long")
    with pytest.raises(RequestError, match=f"the model reads {limit}; shorten the prompt"):
        prompt_rows(model, request, CONTEXTS)
