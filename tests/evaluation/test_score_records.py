"""Scores kept beside a run: what goes in comes out, and damage is named."""

from pathlib import Path

import pytest

from nmke.errors import LedgerError
from nmke.evaluation.metrics import Estimate
from nmke.evaluation.score_records import read_scores, save_scores
from nmke.evaluation.score_table import ProtocolScores, ScoreTable
from nmke.types import EditRequest

REQUESTS = [EditRequest("The capital of {} is", "France", "Lyon")]


def table(mean: float) -> ScoreTable:
    scores = ProtocolScores(
        "teacher_forced/1", {"reliability": Estimate(mean, 0.1, 1.0, 3)}, 3, {"reliability": 3}
    )
    return ScoreTable({"teacher_forced": scores}, ())


def test_records_are_read_back_and_the_same_state_replaces_its_own(tmp_path: Path) -> None:
    assert read_scores(tmp_path) == []
    first = save_scores(tmp_path, "a" * 64, REQUESTS, table(0.5))
    assert read_scores(tmp_path) == [first]
    again = save_scores(tmp_path, "a" * 64, REQUESTS, table(0.7))
    other = save_scores(tmp_path, "b" * 64, REQUESTS, table(0.9))
    found = read_scores(tmp_path)
    assert {record.content_hash: record for record in found} == {"a" * 64: again, "b" * 64: other}
    assert again.protocols["teacher_forced"]["reliability"] == 0.7 and again.n_facts == 1


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", '{"schema": "nmke.scores/2"}', '{"schema": "nmke.scores/1", "x": 1}']
)
def test_a_damaged_record_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "scores").mkdir()
    (tmp_path / "scores" / "x.json").write_text(text)
    with pytest.raises(LedgerError, match=r"x\.json.*score again with `nmke eval`"):
        read_scores(tmp_path)
