"""`nmke reproduce` on a tiny model: what it compared, what it says, how it leaves."""

import json
from pathlib import Path

import pytest
from tests.cli.conftest import Nmke

from nmke.editors import nmke as nmke_method


def test_a_run_is_reproduced_and_a_tampered_one_exits_7(nmke: Nmke, edited: str) -> None:
    assert nmke("undo", "run").code == 0
    done = nmke("reproduce", "run")
    assert done.code == 0, done.err
    assert "content hashes, bit for bit" in done.out and "result    reproduced" in done.out
    found = nmke("reproduce", "run", "-o", "again", "--json").json
    assert found["schema"] == "nmke.reproduce/1"
    assert found["reproduced"] and found["comparison"] == "hash" and found["batches"] == 1
    assert found["content_hash"]["recorded"] == found["content_hash"]["again"]
    assert nmke("verify", "again").code == 0
    occupied = nmke("reproduce", "run", "-o", "again")
    assert occupied.code == 2 and "exists" in occupied.err
    Path("run/reproduce.json").write_text(
        json.dumps({**json.loads(Path("run/reproduce.json").read_text()), "facts_sha256": "0"})
    )
    wrong = nmke("reproduce", "run")
    assert wrong.code == 7 and "facts_sha256" in wrong.err


def test_a_result_that_differs_is_shown_and_exits_7(
    nmke: Nmke, edited: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = nmke_method._largest
    monkeypatch.setattr(nmke_method, "_largest", lambda *given: plain(*given) * 1.01)
    done = nmke("reproduce", "run")
    assert (
        done.code == 7
        and "not reproduced" in done.out
        and "is the first with another content hash" in done.err
    )


def test_the_base_may_lie_elsewhere(
    nmke: Nmke, source: Path, facts: Path, settings: list[str], tmp_path: Path
) -> None:
    moved = tmp_path / "model"
    moved.symlink_to(source)
    assert nmke("edit", moved, "--facts", facts, "-o", "run", "--no-eval", *settings).code == 0
    assert nmke("reproduce", "run", "--model", source).code == 0
    assert nmke("reproduce", "run", "--model", "nowhere").code == 3
