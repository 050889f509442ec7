"""eval with tasks and times, measurements during a run, and the data verbs."""

import json
from pathlib import Path
from typing import Any

import pytest
from tests.cli.conftest import FACTS, Nmke, write_facts
from tests.evaluation.ability.test_measure import QUESTIONS
from tests.evaluation.test_download import CONTENT, Server, server, sha256
from tests.facts.test_case_shapes import MQUAKE

from nmke.evaluation.data_sets import DataFile, DataSet, data_sets
from nmke.facts import locate
from nmke.registry import Entry

__all__ = ["server"]  # a fixture of the tests of downloads


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data folder of the test's own, and no other."""
    folder = tmp_path / "data"
    folder.mkdir()
    texts = [f"The train {i} had left the old harbour and you walked." * 4 for i in range(6)]
    (folder / "text_wikitext2_test.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    (folder / "bench_arc_easy_test.jsonl").write_text("".join(json.dumps(q) + "\n" for q in QUESTIONS))
    (folder / "mquake_hard.jsonl.gz").write_text(json.dumps(MQUAKE) + "\n")
    monkeypatch.setattr(locate, "_folders", lambda: [folder])
    monkeypatch.setenv("NMKE_DATA", str(folder))
    return folder


def test_eval_shows_both_times_and_every_task_before_and_after(nmke: Nmke, edited: str, data: Path) -> None:
    asked = ("eval", "run", "--when", "both", "--tasks", "edits,wikitext,arc_easy,fluency", "--limit", 2)
    found = nmke(*asked, "--json").json
    last, at_edit = found["protocols"]["teacher_forced"], found["protocols_at_edit"]["teacher_forced"]
    assert last["n"] == at_edit["n"] == found["n_facts"] == 2
    assert set(found["tasks"]) == {"wikitext", "arc_easy", "fluency"}
    text = found["tasks"]["wikitext"]
    assert text["after"]["n"] == text["before"]["n"] == 2 and text["after"]["kl"] > 0.0
    assert text["after"]["perplexity"] != text["before"]["perplexity"]
    change = found["tasks"]["arc_easy"]["change"]["acc"]
    assert change["n"] == 2 and change["interval"][0] <= change["mean"] <= change["interval"][1]
    shown = nmke(*asked)
    assert "right after each batch" in shown.out and "after the last edit" in shown.out
    assert "perplexity" in shown.out and "nmke_wikitext2/1" in shown.out
    assert all(len(line) <= 80 for line in shown.out.splitlines())
    assert _timeless(nmke(*asked, "--json").json) == _timeless(found)


def _timeless(found: dict[str, Any]) -> dict[str, Any]:
    """The object without the seconds that each side took."""
    for sides in found["tasks"].values():
        for side in ("before", "after"):
            del sides[side]["seconds"]
    return found


def test_eval_of_a_model_takes_tasks_without_facts_and_benchmarks_by_name(
    nmke: Nmke, source: Path, data: Path
) -> None:
    found = nmke("eval", source, "--tasks", "arc_easy", "--json").json
    assert found["n_facts"] == 0 and found["tasks"]["arc_easy"]["after"]["n"] == 3
    assert "before" not in found["tasks"]["arc_easy"]
    hops = nmke("eval", source, "--facts", "mquake-hard", "--json").json
    assert (
        hops["n_facts"] == 2 and hops["protocols"]["teacher_forced"]["counts"]["portability_multi_hop"] == 2
    )


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (("--tasks", "lambda"), 2, "did you mean 'lambada'"),
        (("--when", "before"), 2, "unknown time of scoring 'before'"),
        (("--when", "at-edit", "--facts", "f"), 2, "has no batches"),
        ((), 2, "give --facts, or --tasks without edits"),
        (("--tasks", "piqa"), 3, "nmke data get piqa"),
        (("--tasks", "mmlu"), 3, "bench_mmlu.jsonl, which is not on this machine; put it"),
    ],
)
def test_wrong_questions_are_refused(
    nmke: Nmke, source: Path, data: Path, flags: tuple[str, ...], code: int, words: str
) -> None:
    write_facts(Path("f"))
    done = nmke("eval", source, *flags)
    assert done.code == code and words in done.err


def test_edit_measures_every_so_many_edits(
    nmke: Nmke, source: Path, facts: Path, settings: list[str], data: Path
) -> None:
    flags = ("--eval-every", 4, "--eval-tasks", "edits,wikitext", "--eval-limit", 2)
    done = nmke("edit", source, "--facts", facts, "-o", "run", "--no-eval", "--json", *flags, *settings)
    records = done.json["checkpoints"]
    assert [record["edits_of_command"] for record in records] == [4]
    assert records[0]["content_hash"] == done.json["content_hash"]
    assert records[0]["tasks"]["wikitext"]["after"]["n"] == 2
    assert records[0]["tasks"]["edits"]["teacher_forced"]["n"] == 2
    assert "after 4 edits" in done.err and "kl" in done.err
    lines = Path("run/checkpoints.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == records
    scored = nmke("eval", "run", "--tasks", "wikitext", "--limit", 2, "--json").json["tasks"]["wikitext"]
    assert scored["after"]["perplexity"] == pytest.approx(
        records[0]["tasks"]["wikitext"]["after"]["perplexity"]
    )
    assert nmke("verify", "run").code == 0
    assert (
        nmke("edit", source, "--facts", facts, "-o", "x", "--eval-every", 1, "--eval-tasks", "no").code == 2
    )


def test_data_lists_and_fetches(
    nmke: Nmke, data: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = {entry["name"]: entry for entry in nmke("data", "ls", "--json").json["entries"]}
    assert listed["arc_easy"]["path"].endswith("bench_arc_easy_test.jsonl")
    assert listed["zsre"]["path"] is None and listed["zsre"]["can_fetch"] and not listed["mmlu"]["can_fetch"]
    assert "3 of" in nmke("data", "ls").out
    file = DataFile(f"{server.url}/data.jsonl", "zsre_mend_eval.json")
    monkeypatch.setitem(data_sets._entries, "zsre", Entry("zsre", DataSet((file,), "none"), "here", "x"))
    found = nmke("data", "get", "zsre", "--json").json["files"]["zsre"][0]
    assert found == {
        "path": str(data / file.name),
        "sha256": sha256(CONTENT),
        "known": False,
        "fetched": True,
    }
    again = nmke("data", "get", "zsre")
    assert "here already" in again.out and sha256(CONTENT)[:12] in again.out
    assert nmke("data", "ls", "--json").json["entries"][2]["path"].endswith("zsre_mend_eval.json")
    server.files["/data.jsonl"] = b"changed"
    assert nmke("data", "get", "zsre", "--force").code == 7
    assert nmke("data", "get", "mmlu").code == 2
    assert "did you mean 'zsre'" in nmke("data", "get", "zsres").err


def test_facts_stay_usable_by_path(nmke: Nmke, source: Path, data: Path) -> None:
    write_facts(Path("mquake-hard"), FACTS[:1])
    assert nmke("eval", source, "--facts", "mquake-hard", "--json").json["n_facts"] == 1
