import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.tiny import tiny_gemma3, tiny_gpt2, tiny_llama, tiny_opt, tiny_tokenizer

from nmke.errors import RequestError
from nmke.models.tokens import TextEncoder, length_buckets, pad_batch

PROMPT = "The capital of France is"
ROWS = [[5, 6, 7], [9], [11, 12, 13, 14, 15]]


class SlowTokenizer:
    """The fast tokenizer behind the interface of one that knows no offsets."""

    is_fast = False

    def __init__(self):
        self.inner = tiny_tokenizer()
        self.pad_token_id, self.eos_token_id = None, None

    def __call__(self, text, add_special_tokens=True):
        return self.inner(text, add_special_tokens=add_special_tokens)

    def decode(self, ids, **options):
        return self.inner.decode(ids, **options)


class SpacePrefixTokenizer(SlowTokenizer):
    """Puts a space in front of every text, as Llama 2's tokenizer does."""

    def __call__(self, text, add_special_tokens=True):
        return self.inner(" " + text, add_special_tokens=add_special_tokens)


@pytest.fixture(scope="module")
def encoder():
    return TextEncoder(tiny_tokenizer())


@pytest.fixture(scope="module")
def bos_encoder():
    return TextEncoder(tiny_tokenizer(add_bos=True))


def shown(encoder, ids):
    return encoder.tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def test_prefix_is_what_the_tokenizer_adds_in_front(encoder, bos_encoder):
    bos = bos_encoder.tokenizer.bos_token_id
    assert not encoder.adds_bos
    assert bos_encoder.adds_bos
    assert bos_encoder.encode(PROMPT) == [bos, *encoder.encode(PROMPT)]


def test_trailing_special_tokens_are_dropped(encoder):
    class WithEnd(SlowTokenizer):
        def __call__(self, text, add_special_tokens=True):
            ids = self.inner(text, add_special_tokens=False)["input_ids"]
            return {"input_ids": [1, *ids, 2] if add_special_tokens else ids}

    assert TextEncoder(WithEnd()).encode(PROMPT) == [1, *encoder.encode(PROMPT)]


def test_bos_spelled_out_in_the_text_is_not_doubled(bos_encoder):
    assert bos_encoder.encode(f"<s>{PROMPT}") == bos_encoder.encode(PROMPT)


def test_trailing_whitespace_of_a_prompt_is_not_encoded(encoder):
    assert encoder.encode(PROMPT + " \n") == encoder.encode(PROMPT)


def test_empty_prompt_is_refused_without_bos_and_is_the_bos_with_one(encoder, bos_encoder):
    with pytest.raises(RequestError, match="holds no text; give at least one word"):
        encoder.encode("  ")
    assert bos_encoder.encode("") == bos_encoder.prefix_ids


def test_pad_id_falls_back_to_eos_then_zero():
    tokenizer = SlowTokenizer()
    assert TextEncoder(tokenizer).pad_id == 0
    tokenizer.eos_token_id = 7
    assert TextEncoder(tokenizer).pad_id == 7
    tokenizer.pad_token_id = 3
    assert TextEncoder(tokenizer).pad_id == 3


@pytest.mark.parametrize(
    ("text", "target", "whole"),
    [
        (PROMPT, "Lyon", "The capital of France is Lyon"),
        (PROMPT + " ", "Lyon", "The capital of France is Lyon"),
        (PROMPT, " Lyon", "The capital of France is Lyon"),
        (PROMPT, "\nLyon", "The capital of France is\nLyon"),
        ("Q: capital?\nA:\n", "Lyon ", "Q: capital?\nA:\nLyon"),
        ("日本の首都は", "東京", "日本の首都は東京"),
        ("日本の首都は", "とうきょう", "日本の首都はとうきょう"),
        ("서울은", "한국", "서울은 한국"),
    ],
)
def test_prompt_and_target_join_as_the_whole_text(encoder, bos_encoder, text, target, whole):
    for each in (encoder, bos_encoder):
        target_ids = each.encode_target(text, target)
        assert shown(each, target_ids) == whole.removeprefix(text.rstrip())
        assert each.encode(text) + target_ids == each.encode(whole)


def test_target_after_an_empty_prompt_gets_no_space(bos_encoder):
    assert shown(bos_encoder, bos_encoder.encode_target("", "Lyon")) == "Lyon"


def test_target_gets_one_space_from_a_tokenizer_that_adds_its_own():
    encoder = TextEncoder(SpacePrefixTokenizer())
    assert shown(encoder, encoder.encode_target(PROMPT, "Lyon")) == " Lyon"


@pytest.mark.parametrize("target", ["", "  "])
def test_empty_target_is_refused(encoder, target):
    with pytest.raises(RequestError, match="gives no token; name a visible answer"):
        encoder.encode_target(PROMPT, target)


SUBJECTS = [
    ("The capital of ", "France", " is"),
    ("", "France", " is a country"),
    ("The capital of ", "France", "'s oldest region is"),
    ("Who is ", "Zoë Kravitz", "?"),
    ("Who is ", "🦙", " now"),
    ("Who is ", "Ana 🦙", ""),
    ("首都は", "日本", "です"),
    ("Who is ", "X Æ A-12", " of"),
    ("It was in ", "19", "84 that"),
    ("The ", "Eiffel  Tower", "\n\nis"),
    ("{} braces {", "Ada Lovelace", "} and"),
]


@pytest.mark.parametrize(("before", "subject", "after"), SUBJECTS)
@pytest.mark.parametrize("kind", ["fast", "bos", "slow"])
def test_subject_last_index_is_the_token_that_completes_the_subject(kind, before, subject, after):
    tokenizer = {"fast": tiny_tokenizer, "bos": lambda: tiny_tokenizer(add_bos=True), "slow": SlowTokenizer}
    encoder = TextEncoder(tokenizer[kind]())
    text, end = before + subject + after, len(before + subject)
    index = encoder.subject_last_index(text, end)
    ids = encoder.encode(text)[len(encoder.prefix_ids) :]
    index -= len(encoder.prefix_ids)
    assert shown(encoder, ids[: index + 1]).startswith(text[:end].rstrip())
    assert not shown(encoder, ids[:index]).startswith(text[:end].rstrip())


@pytest.mark.parametrize("kind", ["fast", "bos", "slow"])
def test_heads_of_many_prompts_are_those_of_each(kind):
    tokenizer = {"fast": tiny_tokenizer, "bos": lambda: tiny_tokenizer(add_bos=True), "slow": SlowTokenizer}
    encoder = TextEncoder(tokenizer[kind]())
    prompts = [(before + subject + after, len(before + subject)) for before, subject, after in SUBJECTS]
    heads = [encoder.encode(text)[: encoder.subject_last_index(text, end) + 1] for text, end in prompts]
    assert encoder.encode_heads(prompts) == heads


def test_whitespace_at_the_subjects_end_is_not_part_of_it(encoder):
    text = "The capital of France is"
    assert encoder.subject_last_index(text, 22) == encoder.subject_last_index(text, 21)


def test_token_that_straddles_the_subjects_end_counts(encoder):
    ids = encoder.encode("The capital")
    assert shown(encoder, ids[encoder.subject_last_index("The capital", len("The ca")) :]) == " capital"


def test_subject_without_tokens_is_refused(encoder):
    class Deaf(SlowTokenizer):
        def __call__(self, text, add_special_tokens=True):
            return {"input_ids": self.inner(text.replace("☃", ""))["input_ids"]}

    message = "the subject that ends at character 8 of prompt .* gives no token"
    with pytest.raises(RequestError, match=message):
        TextEncoder(Deaf()).subject_last_index("Who is ☃", 8)
    with pytest.raises(RequestError, match="gives no token"):
        encoder.subject_last_index("  is", 1)


@given(before=st.text(max_size=12), subject=st.text(min_size=1, max_size=12), after=st.text(max_size=12))
@settings(max_examples=150, deadline=None)
def test_fast_and_slow_tokenizers_agree_on_any_text(before, subject, after):
    text, end = before + subject + after, len(before + subject)
    if not subject.strip() or not text[: len(text.rstrip())][:end].strip():
        return
    fast, slow = TextEncoder(tiny_tokenizer()), TextEncoder(SlowTokenizer())
    assert fast.subject_last_index(text, end) == slow.subject_last_index(text, end)


@pytest.mark.parametrize("side", ["right", "left"])
def test_pad_batch_marks_real_tokens_and_their_positions(side):
    batch = pad_batch(ROWS, 0, side)
    for row, ids in enumerate(ROWS):
        real = batch.attention_mask[row].bool()
        assert batch.input_ids[row][real].tolist() == ids
        assert batch.position_ids[row][real].tolist() == list(range(len(ids)))
        assert not batch.position_ids[row][~real].any()
        assert not batch.input_ids[row][~real].any()
        assert batch.input_ids[row, batch.last_index[row]] == ids[-1]
        assert [int(batch.input_ids[row, batch.column(row, i)]) for i in range(len(ids))] == ids


@pytest.mark.parametrize("rows", [[], [[], []]])
def test_pad_batch_refuses_a_batch_without_tokens(rows):
    with pytest.raises(RequestError, match="holds no token; give at least one row a token"):
        pad_batch(rows, 0)


@pytest.mark.parametrize("side", ["right", "left"])
def test_empty_row_is_all_padding(side):
    batch = pad_batch([[], [4, 5]], 9, side)
    assert batch.input_ids.tolist() == [[9, 9], [4, 5]]
    assert batch.lengths.tolist() == [0, 2]
    assert batch.position_ids.tolist() == [[0, 0], [0, 1]]


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2, tiny_opt, tiny_gemma3])
@pytest.mark.parametrize("side", ["right", "left"])
def test_padded_logits_equal_unpadded_ones(build, side):
    model = build()
    batch = pad_batch(ROWS, 0, side)
    with torch.no_grad():
        padded = model(**batch.model_inputs).logits
        for row, ids in enumerate(ROWS):
            alone = model(torch.tensor([ids])).logits[0, -1]
            torch.testing.assert_close(padded[row, batch.last_index[row]], alone, atol=1e-5, rtol=1e-5)


@given(st.lists(st.integers(1, 50), max_size=30), st.integers(1, 120))
def test_length_buckets_hold_each_row_once_within_the_budget(lengths, budget):
    buckets = length_buckets(lengths, budget)
    assert sorted(i for bucket in buckets for i in bucket) == list(range(len(lengths)))
    for bucket in buckets:
        assert len(bucket) == 1 or len(bucket) * max(lengths[i] for i in bucket) <= budget


def test_length_buckets_put_equal_lengths_together():
    assert length_buckets([3, 1, 3, 1], 6) == [[1, 3], [0, 2]]
