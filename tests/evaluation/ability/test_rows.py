"""Rows of the ability data sets: the published spelling and the one of a data folder give the same."""

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from nmke.errors import ConfigError, RequestError
from nmke.evaluation.ability import ability_tasks, rows
from nmke.evaluation.ability.measure import read_rows, select
from nmke.evaluation.ability.tasks import prompt_file

QUESTION, TEXTS = "Which of these floats?", ["a stone", "a boat", "a nail", "a key"]
LABELS = ["A", "B", "C", "D"]
FLOATS = {"question": QUESTION, "choices": TEXTS, "answer": 1}


@pytest.mark.parametrize(
    "record",
    [
        {"question": QUESTION, "choices": TEXTS, "answer": 1},
        {"question": QUESTION, "choices": TEXTS, "labels": LABELS, "answer": "B"},
        {"question": QUESTION, "choices": TEXTS, "labels": ["1", "2", "3", "4"], "answer": "2"},
        {
            "question": {
                "stem": QUESTION,
                "choices": [{"text": t, "label": n} for t, n in zip(TEXTS, LABELS, strict=True)],
            },
            "answerKey": "B",
        },
        {"question": QUESTION, "choices": {"text": TEXTS, "label": LABELS}, "answerKey": "B"},
    ],
)
def test_choice_questions_in_every_spelling(record: dict[str, Any]) -> None:
    assert rows.choice(record) == FLOATS


@pytest.mark.parametrize(
    ("convert", "ours", "published"),
    [
        (
            rows.piqa,
            {"goal": "Float", "choices": ["a boat", "a stone"], "answer": 0},
            {"goal": "Float", "sol1": "a boat", "sol2": "a stone", "label": "0"},
        ),
        (
            rows.social_iqa,
            {"question": "Ann fell. How does Ann feel?", "choices": ["well", "hurt", "rich"], "answer": 1},
            {
                "context": "Ann fell.",
                "question": "How does Ann feel?",
                "answerA": "well",
                "answerB": "hurt",
                "answerC": "rich",
                "label": "2",
            },
        ),
        (
            rows.winogrande,
            {
                "question": "The boat beat the raft as the _ was fast.",
                "choices": ["boat", "raft"],
                "answer": 0,
            },
            {
                "sentence": "The boat beat the raft as the _ was fast.",
                "option1": "boat",
                "option2": "raft",
                "answer": "1",
            },
        ),
        (
            rows.boolq,
            {"question": "does a boat float?", "answer": True},
            {"question": "does a boat float", "title": "Boat", "passage": "It does.", "answer": True},
        ),
    ],
)
def test_published_and_own_spelling_agree(
    convert: Any, ours: dict[str, Any], published: dict[str, Any]
) -> None:
    assert convert(ours) == convert(published)


def test_winogrande_puts_each_filling_before_one_ending() -> None:
    row = rows.winogrande({"question": "A _ floats.", "choices": ["boat", "nail"], "answer": 0})
    assert row == {"contexts": ["A boat", "A nail"], "ending": "floats.", "answer": 0}
    with pytest.raises(RequestError, match="has no gap '_'"):
        rows.winogrande({"question": "A boat.", "choices": ["a", "b"], "answer": 0})


def test_lambada_and_gsm8k_part_the_answer() -> None:
    assert rows.lambada({"text": "the boat was on the sea\n"}) == {
        "context": "the boat was on the",
        "word": "sea",
    }
    row = rows.gsm8k({"question": "2000+1?", "answer": "2000+1=2001\n#### 2,001"})
    assert (row["final"], row["solution"]) == ("2001", "2000+1=2001\n#### 2,001")


def test_bbh_reads_published_task_files(tmp_path: Path) -> None:
    path = tmp_path / "word_order.json"
    path.write_text(json.dumps([{"canary": "none", "examples": [{"input": "b a", "target": "a b "}]}]))
    task = ability_tasks.get("bbh")
    assert read_rows(task, path) == [{"question": "b a", "target": "a b", "group": "word_order"}]


def test_malformed_record_names_its_line(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "a b"}\n{"texts": "a b"}\n'))
    with pytest.raises(RequestError, match=r"line 2: no record of LAMBADA.*'text'"):
        read_rows(ability_tasks.get("lambada"), path)


def test_questions_are_drawn_by_the_seed_and_spread_over_parts() -> None:
    made = [{"question": str(i), "group": f"g{i % 7 and 1}"} for i in range(70)]  # 10 of g0, 60 of g1
    first = select(made, 12, 0)
    assert first == select(made, 12, 0) != select(made, 12, 1)
    assert Counter(row["group"] for row in first) == {"g0": 6, "g1": 6}
    assert [int(row["question"]) for row in first] == sorted(int(row["question"]) for row in first)
    assert select(made, 70, 0) == select(made, None, 0) == made
    assert Counter(row["group"] for row in select(made, 40, 0)) == {"g0": 10, "g1": 30}


@pytest.mark.parametrize("name", ability_tasks.names())
def test_every_task_has_a_prompt_file_with_name_and_version(name: str) -> None:
    prompt = prompt_file(name)
    assert prompt["task"].startswith("nmke_") and prompt["metadata"]["version"] >= 1
    assert prompt["metric_list"] and "dataset_path" not in prompt
    if prompt["output_type"] == "generate_until":  # without them the harness compares untrimmed text
        assert [f["function"] for f in prompt["filter_list"][0]["filter"]][-1] == "take_first"


EXPECTED = {
    "mmlu": 1516,
    "gsm8k": 1319,
    "commonsenseqa": 1221,
    "bbh": 6511,
    "arc_easy": 2376,
    "arc_challenge": 1172,
    "piqa": 1838,
    "winogrande": 1267,
    "openbookqa": 500,
    "boolq": 3270,
    "social_iqa": 1954,
    "lambada": 5153,
}


@pytest.mark.parametrize("name", ability_tasks.names())
def test_real_data_reads_whole(name: str) -> None:
    task = ability_tasks.get(name)
    path = task.find()
    if path is None or not path.name.startswith("bench_"):
        pytest.skip(f"no data file of {name} is in NMKE_DATA or ../shared/data")
    found = read_rows(task, path)
    assert len(found) == EXPECTED[name]
    if "choices" in found[0]:
        assert all(0 <= row["answer"] < len(row["choices"]) for row in found)
        assert len({row["answer"] for row in found}) > 1


def test_unknown_task_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="unknown task 'mlmu'; did you mean 'mmlu'"):
        ability_tasks.get("mlmu")
