from itertools import pairwise

import pytest
from tests import runs

from nmke.errors import RequestError
from nmke.models.chat import has_template, reply
from nmke.models.generate import Decoding

TURNS = [{"role": "user", "content": "The train"}]
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}\n{% endfor %}<assistant>"
)


@pytest.fixture
def model():
    return runs.model()


def test_a_model_without_template_continues_the_text(model):
    assert not has_template(model)
    found = reply(model, TURNS, Decoding(5))
    assert found.text == model.generate(["The train"], 5)[0].strip()
    assert found.prompt_tokens == len(model.encoder.encode("The train"))
    assert found.new_tokens == 5 or found.ended


def test_the_answer_is_told_as_it_grows(model):
    told = []
    found = reply(model, TURNS, Decoding(6), tell=told.append)
    assert len(told) == found.new_tokens
    assert told[-1].strip() == found.text
    assert all(later.startswith(earlier) for earlier, later in pairwise(told))


def test_who_listens_can_end_the_answer(model):
    def stop(text):
        raise KeyError(text)

    with pytest.raises(KeyError):
        reply(model, TURNS, Decoding(50), tell=stop)
    assert reply(model, TURNS, Decoding(1)).new_tokens == 1, "the model can be asked again"


def test_conversations_go_through_the_template_unless_raw(model):
    model.tokenizer.chat_template = TEMPLATE
    wrapped = reply(model, TURNS, Decoding(3))
    text = "<user>The train\n<assistant>"
    assert wrapped.text == model.generate([text], 3)[0].strip()
    assert reply(model, TURNS, Decoding(3), raw=True).prompt_tokens < wrapped.prompt_tokens


def test_seeded_draws_repeat(model):
    draws = [reply(model, TURNS, Decoding(8, True, seed, 2.0)).text for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]


def test_what_the_model_cannot_read_is_refused(model):
    with pytest.raises(RequestError, match="reads 256"):
        reply(model, TURNS, Decoding(300))
    with pytest.raises(RequestError, match="an empty message"):
        reply(model, [{"role": "user", "content": "  "}], Decoding(3))
    model.tokenizer.chat_template = TEMPLATE
    turns = [{"role": "system", "content": "x"}, *TURNS]
    with pytest.raises(RequestError, match="chat template refuses the conversation"):
        reply(model, turns, Decoding(3))
