"""Every benchmark reads from the data folder, in its own file and in the canonical name."""

import json
from pathlib import Path

import pytest
from tests.facts.test_case_shapes import MQUAKE

from nmke.errors import ConfigError, RequestError
from nmke.evaluation.benchmarks import benchmarks, read_benchmark
from nmke.facts import locate

# Kinds of question, facts a record, and whether paraphrases and neighbours come with every one.
EXPECTED = {
    "counterfact": (set(), 1, False),
    "counterfact-full": (set(), 1, True),
    "zsre": (set(), 1, True),
    "zsre-knowedit": ({"reasoning", "logical_generalization", "subject_aliasing"}, 1, True),
    "wikibigedit": (set(), 1, True),
    "mquake-hard": ({"multi_hop"}, 4, False),
    "peak-counter": ({"kept_answer"}, 1, True),
    "peak-time": ({"kept_answer"}, 1, True),
    "pitfalls-reverse": ({"conflict", "reversal"}, 2, False),
    "pitfalls-composite": ({"conflict", "tied_fact"}, 2, False),
    "pitfalls-easy": ({"one_to_many"}, 2, False),
    "pitfalls-hard": ({"one_to_many"}, 2, False),
    "wise-temporal": ({"out_of_distribution"}, 1, False),
    "wise-hallucination": (set(), 1, False),
    "known": (set(), 1, False),
}
CANONICAL_ONLY = {"mquake-cf-3k", "wikibigedit-full"}


def test_every_benchmark_is_covered() -> None:
    assert set(benchmarks.names()) == set(EXPECTED) | CANONICAL_ONLY


@pytest.mark.parametrize("name", EXPECTED)
def test_first_60_records_of_each_data_set(name: str) -> None:
    if benchmarks.get(name).find() is None:
        pytest.skip(f"no file of {name} is in NMKE_DATA or ../shared/data")
    kinds, facts, complete = EXPECTED[name]
    found = read_benchmark(name, limit=60)
    assert len(found.cases) == 60
    assert {question.kind for case in found.cases for question in case.questions} == kinds
    assert all(len(case.requests) == facts for case in found.cases)
    assert len({request.id for request in found.requests}) == 60 * facts
    assert all(request.subject in request.text for request in found.requests)
    if complete:
        assert all(request.paraphrases and request.neighborhood for request in found.requests)
    assert not any("skipped" in note for note in found.notes)


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data folder of the test's own, and no other."""
    monkeypatch.setattr(locate, "_folders", lambda: [tmp_path])
    return tmp_path


def test_canonical_file_is_read_like_the_other(empty: Path) -> None:
    (empty / "MQuAKE-CF-3k.json").write_text(json.dumps([MQUAKE]))
    assert read_benchmark("mquake-cf-3k").cases[0].id == "mquake-5"
    (empty / "MQuAKE-hard.json").write_text(json.dumps([MQUAKE]))
    assert read_benchmark("mquake-hard").path.name == "MQuAKE-hard.json"


def test_missing_file_says_how_to_get_it(empty: Path) -> None:
    with pytest.raises(
        RequestError, match=r"needs zsre\.jsonl or zsre_mend_eval\.json.*`nmke data get zsre`"
    ):
        read_benchmark("zsre")


def test_unknown_benchmark_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="unknown benchmark 'counterfacts'; did you mean 'counterfact'"):
        read_benchmark("counterfacts")
