"""EasyEdit's requests mean the same facts in both of its forms, and an edit from them is an ordinary edit."""

from pathlib import Path
from typing import Any

import pytest
from tests import runs

from nmke.compat import easyedit, read_easyedit
from nmke.errors import RequestError
from nmke.types import EditCase, EditRequest, Neighbor, Question

LISTS: dict[str, Any] = {
    "prompts": ["The train had left for France", "The author of Emma is"],
    "subject": ["France", "Emma"],
    "target_new": ["the", "Tim Cook"],
    "ground_truth": ["Paris", "<|endoftext|>"],
    "rephrase_prompts": ["The late train went to France", "Emma was written by"],
    "locality_inputs": {
        "neighborhood": {
            "prompt": ["The train had left for Italy", "Ada is"],
            "ground_truth": ["Rome", "late"],
        },
        "distracting": {
            "prompt": [["Tokyo is", "Paris is"], ["Rome is"]],
            "ground_truth": [["in", "old"], ["in"]],
        },
    },
    "portability_inputs": {
        "One hop": {"prompt": ["Its city is", "She was"], "ground_truth": [["Lyon", "L"], "old"]}
    },
}
DICTS = [
    {
        "prompt": "The train had left for France",
        "subject": "France",
        "target_new": "the",
        "ground_truth": "Paris",
        "rephrase_prompt": "The late train went to France",
        "locality": {
            "neighborhood": {"prompt": "The train had left for Italy", "ground_truth": "Rome"},
            "distracting": {"prompt": ["Tokyo is", "Paris is"], "ground_truth": ["in", "old"]},
        },
        "portability": {"One hop": {"prompt": "Its city is", "ground_truth": ["Lyon", "L"]}},
    },
    {
        "prompt": "The author of Emma is",
        "subject": "Emma",
        "target_new": "Tim Cook",
        "rephrase_prompt": "Emma was written by",
        "locality": {
            "neighborhood": {"prompt": "Ada is", "ground_truth": "late"},
            "distracting": {"prompt": ["Rome is"], "ground_truth": ["in"]},
        },
        "portability": {"One hop": {"prompt": "She was", "ground_truth": "old"}},
    },
]
FRANCE = EditCase(
    (
        EditRequest(
            "The train had left for {}",
            "France",
            "the",
            target_true="Paris",
            paraphrases=("The late train went to France",),
            neighborhood=(
                Neighbor("The train had left for Italy", "Rome"),
                Neighbor("Tokyo is", "in"),
                Neighbor("Paris is", "old"),
            ),
        ),
    ),
    questions=(Question("one_hop", "Its city is", ("Lyon", "L")),),
)


def test_both_forms_mean_the_same_facts() -> None:
    cases = read_easyedit(**LISTS)
    assert cases == read_easyedit(DICTS)
    assert cases[0] == FRANCE
    assert cases[1].requests[0].target_true is None, "EasyEdit's filler is no answer"


def test_one_fact_may_be_given_as_plain_texts() -> None:
    one = read_easyedit(prompts="The train had left for {France}", target_new="the", ground_truth=None)
    assert one == (EditCase((EditRequest("The train had left for {}", "France", "the"),)),)


def test_groups_without_answers_are_read() -> None:
    (case,) = read_easyedit(
        prompts=["Emma is"],
        subject=["Emma"],
        target_new=["old"],
        locality_inputs={"n": {"prompt": ["Ada is"]}},
    )
    assert case.requests[0].neighborhood == (Neighbor("Ada is"),)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({}, "both or neither"),
        ({"requests": DICTS, "prompts": ["x"]}, "both or neither"),
        ({**LISTS, "subject": ["France"]}, "subject has 1 entries for 2 prompts"),
        (
            {**LISTS, "locality_inputs": {"n": {"prompt": ["Ada is"], "ground_truth": ["x", "y"]}}},
            "locality 'n' prompt has 1 entries for 2 prompts",
        ),
        (
            {**LISTS, "locality_inputs": {"n": {"prompt": [["a", "b"], "c"], "ground_truth": [["x"], "y"]}}},
            "locality 'n' ground_truth has 1 entries for 2",
        ),
        ({**LISTS, "locality_inputs": ["Ada is"]}, "no mapping of groups"),
        ({**LISTS, "rephrase_promts": ["x", "y"]}, "did you mean 'rephrase_prompts'"),
        ({"requests": ["The capital"]}, "is a mapping, str found"),
        ({"prompts": ["Emma is"], "target_new": ["old"]}, "names no subject"),
        (
            {"prompts": ["Emma is"], "subject": ["Ada"], "target_new": ["old"]},
            "EasyEdit request, line 1, field 'prompt'",
        ),
        ({"prompts": ["Emma is"], "subject": ["Emma"]}, "field 'target_new': is missing"),
    ],
)
def test_what_cannot_be_read_is_said(call: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        read_easyedit(**call)


def test_an_easyedit_call_edits_and_is_undone(tmp_path: Path) -> None:
    with runs.open_run(tmp_path / "run", **runs.TAKES) as session:
        as_loaded = runs.bits(session.model)
        records = easyedit(session, **LISTS)
        assert [record.request for record in records] == [case.requests[0] for case in read_easyedit(DICTS)]
        first = records[0].detail  # the other answer is out of this model's reach
        assert first["probability_after"] > 10 * first["probability_before"]
        session.undo()
        assert runs.bits(session.model) == as_loaded
