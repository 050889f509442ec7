"""Shapes with several facts or with questions a record: ours, handwritten, in every published spelling."""

import json
from pathlib import Path
from typing import Any

import pytest

from nmke.errors import RequestError
from nmke.facts import FactsFile, read_facts
from nmke.types import EditCase, EditRequest, Neighbor, Question


def rewrite(prompt: str, subject: str, new: str, true: str, **more: Any) -> dict[str, Any]:
    return {
        "prompt": prompt,
        "subject": subject,
        "target_new": {"str": new, "id": "Q1"},
        "target_true": {"str": true, "id": "Q2"},
        "relation_id": "P9",
        **more,
    }


def triple(prompt: str, subject: str, obj: str, new: str | None = None) -> dict[str, Any]:
    relation = {"id": "P1", "prompt": prompt, "query": f"Which is it for {{}}: {prompt[:9]}?", "label": "x"}
    made: dict[str, Any] = {"relation": relation, "subject": {"label": subject}, "object": {"label": obj}}
    return made if new is None else {**made, "new_object": {"label": new}}


MQUAKE = {
    "case_id": 5,
    "requested_rewrite": [
        rewrite("{} was sung by", "Blue Boat", "Ann Lee", "Bo Roe", question="Who sang Blue Boat?"),
        rewrite("{} lives in", "Ann Lee", "Oslo", "Rome", question="Where does Ann Lee live?"),
    ],
    "questions": ["Where does the singer of Blue Boat live?", "In which city is the singer of Blue Boat?"],
    "answer": "Rome",
    "answer_alias": ["Roma"],
    "new_answer": "Oslo",
    "new_answer_alias": ["Christiania"],
    "single_hops": [],
    "new_single_hops": [],
}
PEAK = {
    "case_id": 7,
    "requested_rewrite": rewrite("{} has a border with", "Borduria", "Peru", "Syldavia"),
    "postive_list": ["Syldavia", "Zubrowka", "Ruritania"],
    "negtive_list": ["Chile", "Bolivia"],
    "para_add_prompts": ["Borduria touches"],
    "neighborhood_prompts": [["Zubrowka has a border with", "Ruritania"]],
    "negtive_random_list": ["a shoe"],
}
REVERSE = {
    "type": "reverse",
    "rule": "P1>P2",
    "triples": [],
    "prerequisites": [],
    "edits": [
        triple("The student of {} is", "Ann", "Bo", "Cy"),
        triple("The teacher of {} is", "Cy", "Ann", "Di"),
    ],
}
COMPOSITE = {
    "type": "composite",
    "rule": "P1&P2>P3",
    "triples": [
        triple("The child of {} is", "Ann", "Bo"),
        triple("The mother of {} is", "Bo", "Eve"),
        triple("The spouse of {} is", "Ann", "Eve"),
    ],
    "prerequisites": [0],
    "edits": [
        triple("The mother of {} is", "Bo", "Eve", "Fay"),
        triple("The spouse of {} is", "Ann", "Eve", "Gil"),
    ],
}
ROUND = {
    "type": "1-3@P1",
    "edit": triple("{} lies in", "the Long Wall", "Asia", "Castle Hill"),
    "true_objects": [{"label": "Asia"}, {"label": "Borduria"}, {"label": "Castle Hill"}],
}
KNOWN = {
    "known_id": 3,
    "subject": "Blue Boat",
    "attribute": "Ann Lee",
    "template": "{} is sung",
    "prediction": " Ann Lee, who",
    "prompt": "Blue Boat is sung by",
    "relation_id": "P175",
}
KNOWEDIT = {
    "case_id": "k",
    "subject": "ZIC3",
    "prompt": "What is ZIC3?",
    "target_new": "a boat",
    "ground_truth": ["a gene"],
    "rephrase_prompt": "Tell what ZIC3 is:",
    "locality": {"Relation_Specificity": [{"prompt": "ZIC3 lies on", "ground_truth": [["X", "chrX"]]}]},
    "portability": {
        "Logical_Generalization": [{"prompt": "Which thing is a boat?", "ground_truth": "ZIC3"}],
        "Subject_Aliasing": [{"prompt": "What is Zic 3?", "ground_truth": [["a boat", "boat"], ["a boat"]]}],
        "Reasoning": [{"prompt": "Does it float?", "ground_truth": []}],
    },
}
WIKIBIGEDIT = {
    "tag": "new",
    "subject": "Ann Lee",
    "relation": "residence",
    "object": "Oslo",
    "update": "Where does Ann Lee live?",
    "ans": "Oslo",
    "rephrase": "In which city is Ann Lee at home?",
    "personas": "Tell me, matey, where be Ann Lee living?",
    "loc": "Where does Bo Roe live?",
    "loc_ans": "Rome",
    "mhop": "In which country does Ann Lee live?",
    "mhop_ans": "Norway",
}
WISE = {
    "prompt": "Ann Lee is",
    "subject": "Ann Lee is",
    "target_new": "a singer from Oslo.",
    "ood_rephrase": "Ann Lee isn't only known for songs.",
    "locality_prompt": "The map of the town",
    "locality_ground_truth": "has a scratch",
}


def read(tmp_path: Path, *records: Any, **options: Any) -> FactsFile:
    path = tmp_path / "facts.json"
    path.write_text(json.dumps(records))
    return read_facts(path, **options)


def only(tmp_path: Path, record: Any, shape: str) -> EditCase:
    found = read(tmp_path, record)
    assert (found.shape, len(found.cases)) == (shape, 1)
    return found.cases[0]


def texts(requests: tuple[EditRequest, ...]) -> list[tuple[str, str, str | None]]:
    return [(request.text, request.target_new, request.target_true) for request in requests]


def test_mquake_edits_all_facts_of_a_case_and_asks_the_hops(tmp_path: Path) -> None:
    case = only(tmp_path, MQUAKE, "mquake")
    assert case.id == "mquake-5"
    assert [request.id for request in case.requests] == ["mquake-5-1", "mquake-5-2"]
    assert texts(case.requests) == [
        ("Blue Boat was sung by", "Ann Lee", "Bo Roe"),
        ("Ann Lee lives in", "Oslo", "Rome"),
    ]
    assert case.requests[0].paraphrases == ("Who sang Blue Boat?",)
    answers = ("Oslo", "Christiania")
    assert case.questions == tuple(
        Question("multi_hop", text, answers, "Rome") for text in MQUAKE["questions"]
    )
    assert case.final_requests == case.requests


def test_peak_asks_whether_older_answers_stay_likelier_than_false_ones(tmp_path: Path) -> None:
    case = only(tmp_path, PEAK, "peak")
    prompt = "Borduria has a border with"
    assert case.requests[0].paraphrases == ("Borduria touches",)
    assert case.requests[0].neighborhood == (Neighbor("Zubrowka has a border with", "Ruritania"),)
    assert case.questions == (
        Question("kept_answer", prompt, ("Syldavia",), "Chile"),
        Question("kept_answer", prompt, ("Zubrowka",), "Bolivia"),
        Question("kept_answer", prompt, ("Ruritania",), "Chile"),
    )
    broken = {**PEAK, "neighborhood_prompts": [["one"]]}
    with pytest.raises(
        RequestError, match=r"neighborhood_prompts\[0\]': is no pair; write \[prompt, answer\]"
    ):
        read(tmp_path, broken)


def test_reverse_conflict_asks_the_second_fact_against_what_the_first_implies(tmp_path: Path) -> None:
    case = only(tmp_path, REVERSE, "conflict")
    assert texts(case.requests) == [
        ("The student of Ann is", "Cy", "Bo"),
        ("The teacher of Cy is", "Di", "Ann"),
    ]
    assert case.questions == (
        Question("reversal", "The student of Di is", ("Cy",)),
        Question("conflict", "The teacher of Cy is", ("Di",), "Ann"),
    )
    assert case.id.startswith("conflict-") and case.requests[1].id == f"{case.id}-2"


def test_composite_conflict_asks_the_tied_fact(tmp_path: Path) -> None:
    case = only(tmp_path, COMPOSITE, "conflict")
    assert case.questions == (
        Question("tied_fact", "The child of Ann is", ("Bo",)),
        Question("conflict", "The spouse of Ann is", ("Gil",), "Fay"),
    )
    with pytest.raises(RequestError, match=r"'prerequisites'.*9 is no place in `triples`"):
        read(tmp_path, {**COMPOSITE, "prerequisites": [9]})


def test_round_edit_goes_away_and_back_and_asks_the_other_answers(tmp_path: Path) -> None:
    case = only(tmp_path, ROUND, "round")
    assert [request.target_new for request in case.requests] == ["Castle Hill", "Asia"]
    assert case.final_requests == case.requests[1:]
    assert case.questions == (Question("one_to_many", "the Long Wall lies in", ("Borduria",), "Castle Hill"),)


def test_known_facts_are_true_already(tmp_path: Path) -> None:
    case = only(tmp_path, KNOWN, "known")
    assert (case.id, case.requests[0].text, case.requests[0].target_new) == (
        "known-3",
        "Blue Boat is sung by",
        "Ann Lee",
    )


def test_knowedit_portability_keeps_groups_and_every_answer(tmp_path: Path) -> None:
    case = only(tmp_path, KNOWEDIT, "knowedit")
    assert case.requests[0].neighborhood == (Neighbor("ZIC3 lies on", "X"),)
    assert case.questions == (
        Question("logical_generalization", "Which thing is a boat?", ("ZIC3",)),
        Question("subject_aliasing", "What is Zic 3?", ("a boat", "boat")),
    )


def test_wikibigedit_as_published(tmp_path: Path) -> None:
    case = only(tmp_path, WIKIBIGEDIT, "wikibigedit")
    request = case.requests[0]
    assert (request.prompt, request.target_new) == ("Where does {} live?", "Oslo")
    assert request.paraphrases == ("In which city is Ann Lee at home?",)
    assert request.neighborhood == (Neighbor("Where does Bo Roe live?", "Rome"),)
    assert case.questions == (
        Question("persona", "Tell me, matey, where be Ann Lee living?", ("Oslo",)),
        Question("multi_hop", "In which country does Ann Lee live?", ("Norway",)),
    )
    assert only(tmp_path, {**WIKIBIGEDIT, "mhop_ans": None}, "wikibigedit").questions[1:] == ()


@pytest.mark.parametrize(
    ("text", "opening", "rest"),
    [
        ("Ann Lee is known.", "Ann Lee is", " known."),
        ("Ann Lee isn't only known for songs.", "Ann Lee", " isn't only known for songs."),
        ("Ann Lee island.", "Ann Lee", " island."),
        ("Ann Leeward", "Ann", " Leeward"),
        ("Ann Lee, a singer", "Ann Lee", ", a singer"),
    ],
)
def test_temporal_texts_are_parted_at_a_word(tmp_path: Path, text: str, opening: str, rest: str) -> None:
    case = only(tmp_path, {**WISE, "ood_rephrase": text}, "easyedit")
    assert case.questions == (Question("out_of_distribution", opening, (rest,)),)


def test_temporal_text_with_nothing_shared_asks_nothing(tmp_path: Path) -> None:
    assert only(tmp_path, {**WISE, "ood_rephrase": "She sings."}, "easyedit").questions == ()


def test_repeated_cases_are_skipped_or_refused(tmp_path: Path) -> None:
    assert len(read(tmp_path, REVERSE, REVERSE).cases) == 1
    with pytest.raises(RequestError, match="'mquake-5' is also the id"):
        read(tmp_path, MQUAKE, MQUAKE)


def test_distinct_leaves_out_what_was_asked_before(tmp_path: Path) -> None:
    again = {**PEAK, "case_id": 8, "requested_rewrite": rewrite("{} touches", "borduria", "Mali", "Syldavia")}
    marked = {
        **PEAK,
        "case_id": 9,
        "requested_rewrite": rewrite("{} touches", "Mali", "Peru", "Togo"),
        "shares_subject_relation": True,
    }
    assert len(read(tmp_path, PEAK, again, marked).cases) == 3
    found = read(tmp_path, PEAK, again, marked, distinct=True)
    assert [case.id for case in found.cases] == ["peak-7"]
    assert "2 records left out: others ask for the same subject and relation" in found.notes


def test_empty_question_and_case_are_refused() -> None:
    with pytest.raises(RequestError, match="prompt or first answer empty"):
        Question("multi_hop", "Where?", (" ",))
    with pytest.raises(RequestError, match="holds no fact to edit"):
        EditCase((), "x")
