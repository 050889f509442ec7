"""The facts and openers that ship in `nmke.data` keep the rules their readers rely on."""

import json
import re
import unicodedata
from collections import Counter, defaultdict
from importlib.resources import files

import pytest

from nmke.types import SUBJECT_SLOT, EditRequest, Neighbor

FIELDS = {
    "id",
    "relation",
    "prompt",
    "subject",
    "target_new",
    "target_true",
    "paraphrases",
    "neighborhood",
}
MIN_FACTS = 120
MIN_RELATIONS = 12
MIN_FACTS_PER_RELATION = 10
MIN_LEADING_SUBJECTS = 5
MIN_OPENERS = 200
MAX_ANSWER_WORDS = 4
MAX_OPENER_WORDS = 8


def read_resource(name: str) -> str:
    return (files("nmke.data") / name).read_text(encoding="utf-8")


FACTS = [json.loads(line) for line in read_resource("facts.jsonl").splitlines()]
OPENERS = read_resource("openers.txt").split("\n")[:-1]

each_fact = pytest.mark.parametrize("fact", FACTS, ids=[fact["id"] for fact in FACTS])


def fill(fact: dict) -> str:
    return fact["prompt"].replace(SUBJECT_SLOT, fact["subject"])


def mentions(text: str, name: str) -> bool:
    """Whether `name` stands in `text` as whole words, whatever the case."""
    return re.search(rf"(?<!\w){re.escape(name.casefold())}(?!\w)", text.casefold()) is not None


def test_facts_are_many_and_spread_over_relations():
    counts = Counter(fact["relation"] for fact in FACTS)
    assert len(FACTS) >= MIN_FACTS
    assert len(counts) >= MIN_RELATIONS
    assert min(counts.values()) >= MIN_FACTS_PER_RELATION


def test_fact_ids_are_distinct_and_plain():
    ids = [fact["id"] for fact in FACTS]
    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name) for name in ids)


def test_no_subject_is_edited_twice_in_a_relation():
    pairs = Counter((fact["relation"], fact["subject"].casefold()) for fact in FACTS)
    assert max(pairs.values()) == 1


def test_no_two_facts_ask_the_same():
    texts = [fill(fact).casefold() for fact in FACTS]
    assert len(set(texts)) == len(texts)


@each_fact
def test_fact_has_exactly_the_known_fields(fact):
    assert set(fact) == FIELDS
    assert fact["id"].startswith(fact["relation"] + "-")


@each_fact
def test_fact_text_is_clean(fact):
    texts = [
        fill(fact),
        fact["subject"],
        fact["target_new"],
        fact["target_true"],
        *fact["paraphrases"],
        *(neighbor[field] for neighbor in fact["neighborhood"] for field in ("prompt", "answer")),
    ]
    for text in texts:
        assert text and text == " ".join(text.split())
        assert text == unicodedata.normalize("NFC", text)


@each_fact
def test_prompt_has_one_slot_and_builds_a_request(fact):
    assert fact["prompt"].count(SUBJECT_SLOT) == 1
    request = EditRequest(
        prompt=fact["prompt"],
        subject=fact["subject"],
        target_new=fact["target_new"],
        id=fact["id"],
        target_true=fact["target_true"],
        relation=fact["relation"],
        paraphrases=tuple(fact["paraphrases"]),
        neighborhood=tuple(Neighbor(**neighbor) for neighbor in fact["neighborhood"]),
    )
    assert request.text == fill(fact)
    assert request.text[: request.subject_end].endswith(fact["subject"])


@each_fact
def test_target_new_is_visibly_another_answer(fact):
    new, true = fact["target_new"].casefold(), fact["target_true"].casefold()
    assert new != true
    assert new.split()[0] != true.split()[0]
    assert max(len(new.split()), len(true.split())) <= MAX_ANSWER_WORDS


@each_fact
def test_prompts_do_not_give_the_answer_away(fact):
    for text in (fill(fact), *fact["paraphrases"]):
        if fact["relation"] == "element-symbol":  # "K" is no word of its own in a sentence; case decides
            assert fact["target_true"] not in text.split()
            assert fact["target_new"] not in text.split()
        else:
            assert not mentions(text, fact["target_true"])
            assert not mentions(text, fact["target_new"])


@each_fact
def test_paraphrases_are_two_and_ask_in_other_words(fact):
    first, second = fact["paraphrases"]
    assert first != second
    asked = fill(fact).casefold()
    for paraphrase in (first, second):
        assert fact["subject"] in paraphrase
        assert SUBJECT_SLOT not in paraphrase
        assert paraphrase.casefold() not in asked
        assert asked not in paraphrase.casefold()


@each_fact
def test_neighbors_are_three_about_subjects_nobody_edits(fact):
    neighbors = fact["neighborhood"]
    assert len({neighbor["prompt"] for neighbor in neighbors}) == len(neighbors) == 3
    edited = [other["subject"] for other in FACTS if other["relation"] == fact["relation"]]
    for neighbor in neighbors:
        assert set(neighbor) == {"prompt", "answer"}
        assert SUBJECT_SLOT not in neighbor["prompt"]
        assert [subject for subject in edited if mentions(neighbor["prompt"], subject)] == []
        assert neighbor["prompt"].split()[-1].casefold() != neighbor["answer"].split()[-1].casefold()


def test_a_neighbor_prompt_has_one_answer_everywhere():
    answers = defaultdict(set)
    for fact in FACTS:
        for neighbor in fact["neighborhood"]:
            answers[neighbor["prompt"]].add(neighbor["answer"])
    assert {prompt: found for prompt, found in answers.items() if len(found) > 1} == {}


def test_paraphrase_wordings_vary_within_each_relation():
    wordings = defaultdict(set)
    for fact in FACTS:
        wordings[fact["relation"]].add(
            tuple(paraphrase.replace(fact["subject"], SUBJECT_SLOT) for paraphrase in fact["paraphrases"])
        )
    assert min(len(found) for found in wordings.values()) >= 3


def test_some_one_word_subjects_open_the_prompt():
    leading = [
        fact["subject"]
        for fact in FACTS
        if fact["prompt"].startswith(SUBJECT_SLOT) and fact["subject"].isascii() and fact["subject"].isalpha()
    ]
    assert len(leading) >= MIN_LEADING_SUBJECTS
    assert {"Japan", "India", "Mexico", "Poland", "Sweden"} <= set(leading)


def test_some_subjects_are_not_ascii():
    assert sum(not fact["subject"].isascii() for fact in FACTS) >= 3


def test_openers_are_many_distinct_and_short():
    assert len(OPENERS) >= MIN_OPENERS
    assert len({opener.casefold() for opener in OPENERS}) == len(OPENERS)
    for opener in OPENERS:
        assert opener and opener == opener.strip()
        assert opener == unicodedata.normalize("NFC", opener)
        assert len(opener.split()) <= MAX_OPENER_WORDS


def test_openers_hold_code_headings_and_other_languages():
    assert any(opener.startswith("def ") for opener in OPENERS)
    assert any(opener.startswith("import ") for opener in OPENERS)
    assert any(opener.startswith("#") for opener in OPENERS)
    assert sum(not opener.isascii() for opener in OPENERS) >= 5
