"""neurons and inspect from the command line."""

import json
from pathlib import Path

import pytest
from tests.cli.conftest import Nmke


@pytest.fixture
def run(edited: str) -> str:
    """A run of two batches of two."""
    return edited


def test_neurons_prints_layers_metrics_and_words(nmke: Nmke, source: Path, facts: Path) -> None:
    done = nmke("neurons", source, "--facts", facts, "--limit", 2, "-n", 2, "--share", 0.05)
    assert done.code == 0, done.err
    for word in (
        "lps",
        "gradient",
        "general: depth",
        "top specific",
        "says",
        "hears",
        "12 prompts of 2 facts",
    ):
        assert word in done.out, word
    assert max(map(len, done.out.splitlines())) <= 80


def test_neurons_keeps_the_record_that_it_prints(nmke: Nmke, source: Path, facts: Path) -> None:
    flags = ["--metric", "mpc,ablation", "--layers", "1-2", "--bare", "--token", "subject", "--share", 0.1]
    done = nmke("neurons", source, "--facts", facts, *flags, "--json", "-o", "record.json")
    assert done.code == 0, done.err
    found = done.json
    assert found == json.loads(Path("record.json").read_text())
    assert found["schema"] == "nmke.neurons/1" and list(found["metrics"]) == ["mpc", "ablation"]
    assert [row["layer"] for row in found["metrics"]["ablation"]["layers"]] == [1, 2]
    assert len(found["prompts"]) == 4 and found["settings"]["token"] == "subject"


def test_neurons_of_a_run_are_those_of_the_edited_model(
    nmke: Nmke, run: str, source: Path, facts: Path
) -> None:
    flags = ["--facts", facts, "--metric", "contribution", "--bare", "--json"]
    edited, plain = nmke("neurons", run, *flags).json, nmke("neurons", source, *flags).json
    assert edited["metrics"]["contribution"]["layers"] != plain["metrics"]["contribution"]["layers"]


def test_neurons_refuses_what_it_does_not_know(nmke: Nmke, source: Path) -> None:
    wrong = nmke("neurons", source, "--metric", "lsp")
    assert wrong.code == 2 and "did you mean 'lps'" in wrong.err
    assert nmke("neurons", source, "--limit", 1, "--layers", "9", "--bare").code == 2


def test_inspect_shows_what_an_edit_used(nmke: Nmke, run: str) -> None:
    done = nmke("inspect", run, "f2", "--json")
    assert done.code == 0, done.err
    found = done.json
    assert found["schema"] == "nmke.inspect/1" and found["id"] == "f2" and found["active"]
    for layer in found["layers"]:
        assert layer["allowed"] < layer["d_mlp"] and 1 <= layer["for_half"] <= layer["for_most"]
        carried = [one["carries"] for one in layer["neurons"]]
        assert carried == sorted(carried, reverse=True) and 0 < carried[0] <= 1.5
        assert all(len(one["before"]) == len(one["after"]) == 5 for one in layer["neurons"])
    shown = nmke("inspect", run, "f2", "-n", 1).out
    assert "carry half" in shown and "before" in shown and "after" in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_inspect_finds_edits_that_were_taken_back(nmke: Nmke, run: str) -> None:
    assert nmke("undo", run, "-n", 1).code == 0
    found = nmke("inspect", run, "f3", "--json").json
    assert not found["active"] and found["layers"][0]["neurons"]


def test_inspect_of_an_unknown_edit_says_so(nmke: Nmke, run: str) -> None:
    done = nmke("inspect", run, "nothing")
    assert done.code == 3 and "fits 0 edits" in done.err
