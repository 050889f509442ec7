"""How a list of facts is cut into batches."""

from hypothesis import given
from hypothesis import strategies as st

from nmke.batches import LOOK_AHEAD, cut
from nmke.config import EditConfig
from nmke.types import EditRequest

TEMPLATES = ("The capital of {} is", "People in {} speak")
asked = st.lists(st.tuples(st.sampled_from(TEMPLATES), st.sampled_from("ABCDE")), max_size=40)


def requests(pairs: list[tuple[str, str]]) -> list[EditRequest]:
    return [EditRequest(text, subject, "Rome", id=str(n)) for n, (text, subject) in enumerate(pairs)]


@given(asked, st.integers(1, 6), st.booleans())
def test_every_fact_is_in_one_batch_and_edits_of_one_fact_keep_their_order(pairs, size, hold):
    config = EditConfig.create(batch_size=size, hold_earlier=hold)
    facts = requests(pairs)
    batches = list(cut(facts, config))
    assert all(0 < len(batch) <= size for batch in batches)
    edited = [request for batch in batches for request in batch]
    assert sorted(int(r.id) for r in edited) == list(range(len(facts)))
    for key in (lambda r: r.fact_key,) if not hold else (lambda r: r.fact_key, lambda r: r.subject_key):
        assert all(len({key(r) for r in batch}) == len(batch) for batch in batches)
        for one in facts:
            alike = [int(r.id) for r in edited if key(r) == key(one)]
            assert alike == sorted(alike)


@given(asked, st.integers(1, 6), st.booleans(), st.integers(0, 8))
def test_what_is_left_is_cut_as_if_there_had_been_no_break(pairs, size, hold, done):
    config = EditConfig.create(batch_size=size, hold_earlier=hold)
    facts = requests(pairs)
    batches = list(cut(facts, config))
    behind = {request.id for batch in batches[:done] for request in batch}
    assert list(cut([r for r in facts if r.id not in behind], config)) == batches[done:]


def test_batches_are_full_where_other_facts_are_near():
    facts = requests([(text, subject) for subject in "ABCD" for text in TEMPLATES])  # sorted by subject
    assert [len(batch) for batch in cut(facts, EditConfig.create(batch_size=4, hold_earlier=True))] == [4, 4]


def test_a_long_row_of_facts_about_one_subject_is_not_read_to_its_end():
    config = EditConfig.create(batch_size=2, hold_earlier=True)
    facts = requests([(f"{n} {{}}", "A") for n in range(100)] + [(TEMPLATES[0], "B")])
    first, *others = cut(facts, config)
    assert [r.id for r in first] == ["0"] and len(others) == 99
    assert "100" in {r.id for batch in others[-LOOK_AHEAD * 2 - 2 :] for r in batch}
