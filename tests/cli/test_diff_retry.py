"""diff between states of runs, and retry of edits that did not take."""

from pathlib import Path

import pytest
from tests.cli.conftest import FACTS, Nmke, write_facts


@pytest.fixture
def run(edited: str) -> str:
    """A run of two batches of two."""
    return edited


def test_diff_names_what_the_last_batch_wrote(nmke: Nmke, run: str) -> None:
    found = nmke("diff", "run~1", run, "--json").json
    assert found["schema"] == "nmke.diff/1" and not found["same"]
    assert [(f["a"], f["b"]) for f in found["facts"]] == [(None, "Apple"), (None, "Cook")]
    assert found["b"]["content_hash"] == nmke("log", run, "--json").json["content_hash"]
    before = found["a"]["content_hash"]
    assert nmke("undo", run, "-n", 1).code == 0
    assert nmke("diff", run, run, "--json").json["a"]["content_hash"] == before
    assert "the same model" in nmke("diff", run, run).out


def test_diff_of_two_runs_shows_both_answers(
    nmke: Nmke, run: str, source: Path, tmp_path: Path, settings: list[str]
) -> None:
    other = write_facts(tmp_path / "other.jsonl", [{**FACTS[0], "target_new": "Apple"}])
    assert nmke("edit", source, "--facts", other, "-o", "other", "--no-eval", *settings).code == 0
    found = {f["prompt"]: (f["a"], f["b"]) for f in nmke("diff", run, "other", "--json").json["facts"]}
    assert found["The capital of France is"] == ("Tokyo", "Apple") and len(found) == 4
    assert "The capital of France is" in nmke("diff", run, "other").out


def test_diff_refuses_what_is_not_there(nmke: Nmke, run: str) -> None:
    assert nmke("diff", "run~9", run).code == 3
    assert nmke("diff", "nowhere", run).code == 3


def test_retry_edits_failed_facts_again_with_other_settings(
    nmke: Nmke, source: Path, facts: Path, settings: list[str]
) -> None:
    weak = [*settings, "--steps", "1", "--method", "memit", "--l2", "1000"]
    done = nmke("edit", source, "--facts", facts, "-o", "weak", "--no-eval", "--json", *weak)
    assert done.code == 0, done.err
    assert done.json["n_failed"] > 0
    retried = nmke("retry", "weak", "--json", "--method", "alphaedit", "--steps", "25", "--l2", "0.001")
    assert retried.code == 0, retried.err
    again = retried.json
    assert again["schema"] == "nmke.retry/1" and len(again["edits"]) == done.json["n_failed"]
    raised = [e["detail"]["probability_after"] > e["detail"]["probability_before"] for e in again["edits"]]
    assert any(raised), again
    assert nmke("verify", "weak").code == 0


def test_retry_without_a_failed_edit_says_so(nmke: Nmke, run: str) -> None:
    assert nmke("undo", run, "-n", 2).code == 0
    refused = nmke("retry", run)
    assert refused.code == 3 and "has no failed edit" in refused.err
