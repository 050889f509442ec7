"""What is too long to be edited, or cannot be read, is said before anything is written."""

import pytest
from tests import runs, tiny

from nmke.errors import RequestError
from nmke.models.load import EditableModel
from nmke.readable import MOST_TOKENS, check_editable, check_requests
from nmke.types import EditRequest, Neighbor


@pytest.fixture(scope="module")
def model() -> EditableModel:
    """Reads more tokens than are edited."""
    tokenizer = tiny.tiny_tokenizer()
    long = tiny.tiny_llama(vocab_size=len(tokenizer), max_position_embeddings=8192, num_hidden_layers=4)
    return EditableModel.wrap(long, tokenizer)


def test_a_prompt_of_ten_thousand_characters_is_refused_at_once(model, tmp_path):
    request = EditRequest("on and on " * 1000 + "{} is", "France", "Lyon", id="long")
    with runs.open_run(tmp_path / "run", model) as session:
        for edit in (lambda: session.edit_batch([request]), lambda: list(session.edit_many([request]))):
            with pytest.raises(
                RequestError, match=rf"edit 'long'.* tokens, at most {MOST_TOKENS} are edited"
            ):
                edit()
        assert session.log() == []


def test_prompt_and_answer_count_together_up_to_the_limit(model):
    target = "the " * 300
    length = len(model.encoder.encode_target("of France is", target))
    room = MOST_TOKENS - length - len(model.encoder.encode("of France is"))
    word = len(model.encoder.encode("the of France is")) - len(model.encoder.encode("of France is"))
    fits = EditRequest("the " * (room // word) + "of {} is", "France", target)
    check_editable(model, [fits])
    with pytest.raises(RequestError, match="at most"):
        check_editable(model, [EditRequest("the " * (room // word + 2) + "of {} is", "France", target)])


def test_what_is_only_asked_may_be_as_long_as_the_model_reads(model):
    long = "on and on " * 150
    request = EditRequest("{} is", "France", "Lyon", paraphrases=(long,), neighborhood=(Neighbor(long),))
    check_editable(model, [request])
    with pytest.raises(RequestError, match="the model reads 8192"):
        check_requests(model, [EditRequest("{} is", "France", "Lyon", paraphrases=(long * 30,))])
