"""Contexts that the model writes, and the rows they make with a prompt."""

import pytest
from tests import tiny
from tests.exact import exact

from nmke.editors.contexts import STARTS, write_contexts
from nmke.editors.rows import kl_row, prompt_rows, with_second_anchors
from nmke.errors import RequestError
from nmke.models.load import EditableModel
from nmke.types import EditRequest

CONTEXTS = ("", "I was late. ", "Because ")


@pytest.fixture(scope="module")
def model() -> EditableModel:
    return exact(tiny.tiny_llama)


def test_contexts_are_the_empty_one_and_one_sentence_per_start(model):
    contexts = write_contexts(model, tokens=6, seed=0)
    assert contexts[0] == "" and len(contexts) == 6
    for start, text in zip(STARTS, contexts[1:], strict=True):
        assert text.startswith(start) and text.endswith(". ") and not text.endswith(".. ")
        assert text == " ".join(text.split()) + " "


def test_contexts_are_decided_by_the_seed(model):
    assert write_contexts(model, 6, seed=1) == write_contexts(model, 6, seed=1)
    assert write_contexts(model, 6, seed=1) != write_contexts(model, 6, seed=2)


@pytest.mark.parametrize("add_bos", [False, True])
def test_anchor_is_the_subjects_last_token(add_bos):
    model = exact(tiny.tiny_llama, tiny.tiny_tokenizer(add_bos=add_bos))
    request = EditRequest("The mother tongue of {} is", "Marie Curie", "English")
    rows = prompt_rows(model, request, CONTEXTS)
    assert [row.bare for row in rows] == [True, False, False]
    for context, row in zip(CONTEXTS, rows, strict=True):
        text = model.tokenizer.decode(row.ids[: row.anchor + 1], skip_special_tokens=True)
        assert text == context + "The mother tongue of Marie Curie"
        assert model.tokenizer.decode(row.ids, skip_special_tokens=True) == context + request.text


def test_rows_whose_anchor_is_position_zero_are_left_out():
    request = EditRequest("{} was late", "I", "Rome")
    plain, with_bos = (exact(tiny.tiny_llama, tiny.tiny_tokenizer(add_bos=add)) for add in (False, True))
    assert [row.bare for row in prompt_rows(plain, request, CONTEXTS)] == [False, False]
    assert [row.bare for row in prompt_rows(with_bos, request, CONTEXTS)] == [True, False, False]
    with pytest.raises(RequestError, match=r"the subject 'I' is the model's first token in every context"):
        prompt_rows(plain, request, ("",))


def test_kl_row_is_subject_is_a_off_position_zero(model):
    request = EditRequest("The mother tongue of {} is", "Marie Curie", "English")
    row = kl_row(model, request, CONTEXTS)
    assert model.tokenizer.decode(row.ids) == "Marie Curie is a"
    assert model.tokenizer.decode(row.ids[: row.anchor + 1]) == "Marie Curie"
    short = EditRequest("{} was late", "I", "Rome")
    assert model.tokenizer.decode(kl_row(model, short, CONTEXTS).ids) == "I was late. I is a"
    alone = kl_row(model, short, ("",))
    assert model.tokenizer.decode(alone.ids) == "I is a" and alone.anchor == 0


def test_a_subject_at_position_zero_gets_a_second_anchor_one_word_later(model):
    requests = (
        EditRequest("The capital of {} is", "France", "Rome", id="a"),
        EditRequest("{} was late", "I", "Rome", id="b"),
    )
    found, owners = with_second_anchors(model, requests)
    assert found[:2] == requests and owners == (0, 1, 1)
    assert (found[2].text, found[2].subject, found[2].target_new) == ("I was late", "I was", "Rome")
    assert [row.bare for row in prompt_rows(model, found[2], CONTEXTS)] == [True]
    with_bos = exact(tiny.tiny_llama, tiny.tiny_tokenizer(add_bos=True))
    assert with_second_anchors(with_bos, requests) == (requests, (0, 1))
