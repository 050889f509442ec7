"""Rows of a request, and the second anchor of a subject that is the model's first token."""

import pytest
import torch
from tests import tiny

from nmke.editors.rows import FARTHEST_SINK, BareRequest, prompt_rows, with_second_anchors
from nmke.errors import RequestError
from nmke.models.load import EditableModel, load_model
from nmke.types import EditRequest

CONTEXTS = ("", "I was late. ", "The train had left. ")
FIRST = EditRequest("{} is a city in", "London", "Kenya", id="first")
LATER = EditRequest("The train to {} is", "London", "late", id="later")


@pytest.fixture(scope="module")
def model() -> EditableModel:
    tokenizer = tiny.tiny_tokenizer()
    return EditableModel.wrap(tiny.tiny_llama(vocab_size=len(tokenizer)), tokenizer, name="tiny")


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


def test_a_sink_behind_the_first_token_is_left_out_too(model: EditableModel) -> None:
    request = EditRequest("{} is a city in", "London", "Kenya", id="two")
    anchor = model.encoder.subject_last_index(request.text, request.subject_end)
    ids = tuple(model.encoder.encode(request.text))[: anchor + 1]
    assert 0 < anchor <= FARTHEST_SINK
    assert len(prompt_rows(model, request, CONTEXTS)) == 3 and model.sinks[ids] is False
    model.sinks[ids] = True
    try:
        assert [row.bare for row in prompt_rows(model, request, CONTEXTS)] == [False, False]
        (_, second), owners = with_second_anchors(model, [request])
        assert owners == (0, 0) and second.subject == "London is"
        assert [row.anchor > anchor for row in prompt_rows(model, second, CONTEXTS)] == [True]
    finally:
        model.sinks[ids] = False


def test_the_state_of_position_0_at_another_one_is_a_sink() -> None:
    tokenizer = tiny.tiny_tokenizer()
    causal = tiny.tiny_llama(vocab_size=len(tokenizer))
    model = EditableModel.wrap(causal, tokenizer, name="tiny")
    with torch.no_grad():
        causal.model.embed_tokens.weight.copy_(torch.ones_like(causal.model.embed_tokens.weight))
    request = EditRequest("{} is a city in", "London", "Kenya", id="same")  # every token has the same state
    assert all(not row.bare for row in prompt_rows(model, request, CONTEXTS))


@pytest.mark.model
def test_the_default_model_has_a_sink_behind_phil_and_none_behind_michael() -> None:
    model = load_model("smollm2-135m", device="cpu")
    asked = [EditRequest("{}, the", "Phil Jackson", "x"), EditRequest("{}, the", "Michael Jordan", "x")]
    found, owners = with_second_anchors(model, asked)
    assert owners == (0, 1, 0) and found[2].subject == "Phil Jackson,"


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
