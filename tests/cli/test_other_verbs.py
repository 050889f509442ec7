"""doctor, prepare, cache, help and the demo's choice of facts."""

from pathlib import Path

import pytest
from tests.cli.conftest import Nmke

from nmke.cli.console import say
from nmke.cli.demo import choose_facts
from nmke.cli.main import VERBS


def test_doctor_describes_model_and_installation(nmke: Nmke, source: Path) -> None:
    found = nmke("doctor", source, "--json").json
    assert found["schema"] == "nmke.doctor/1" and found["editable"]
    assert found["layout"]["n_layers"] == 4 and found["layout"]["d_mlp"] == 64
    assert found["statistics_missing"] == found["layers"]
    assert "nmke" in found["methods"] and "entropy" in found["masks"]
    assert "can be edited" in nmke("doctor", source).out
    here = nmke("doctor", "--json").json
    assert here["versions"]["nmke"] and "smollm2-135m" in here["builtin_models"]
    shown = nmke("doctor").out
    assert "versions" in shown and "nmke (default): every fact" in shown


def test_prepare_and_doctor_cover_all_that_the_method_needs(
    nmke: Nmke, source: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("NMKE_CACHE", str(tmp_path / "cache"))
    text = ("--corpus", corpus, "--corpus-tokens", 300, "--layers", "1-2")
    own = (*text, "--method", "nmke")
    before = nmke("doctor", source, *own, "--json").json
    every = {f"{kind} statistics": {"missing": [1, 2]} for kind in ("key", "input", "subject")}
    assert before["method"] == "nmke" and before["statistics"] == every
    linear = ("--method", "nmke-linear", "--json")
    assert nmke("prepare", source, *text, *linear).json["statistics"].keys() == {"key statistics"}
    shown = " ".join(nmke("doctor", source, *own).out.split())
    assert "key statistics are cached; input statistics of layers 1, 2 are not cached" in shown
    done = nmke("prepare", source, *own, "--json").json
    assert done["gathered"] == [1, 2] and len(done["files"]) == 6
    assert done["statistics"]["key statistics"]["gathered"] == []
    assert done["statistics"]["input statistics"]["gathered"] == [1, 2]
    assert nmke("doctor", source, *own, "--json").json["statistics_missing"] == []
    assert "needs no statistics" in nmke("prepare", source, *text, "--method", "ultraedit").out
    assert (
        "method 'ultraedit' needs no statistics" in nmke("doctor", source, *text, "--method", "ultraedit").out
    )


def test_prepare_shows_the_cost_and_is_cached(
    nmke: Nmke, source: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("NMKE_CACHE", str(tmp_path / "cache"))
    arguments = ("prepare", source, "--corpus", corpus, "--corpus-tokens", 300, "--layers", "1-2")
    dry = nmke(*arguments, "--dry-run", "--json")
    assert dry.json["missing"] == [1, 2] and "estimates" in dry.err
    done = nmke(*arguments, "--json").json
    assert done["gathered"] == [1, 2] and all(Path(file).is_file() for file in done["files"])
    assert nmke(*arguments, "--json").json["gathered"] == []
    assert "cached already" in nmke(*arguments).out

    listed = nmke("cache", "ls", "--json").json["entries"]
    assert len(listed) == 6 and "layer" in listed[0]["about"]
    assert "stats/" in nmke("cache", "ls").out
    assert nmke("cache", "verify").code == 0
    Path(listed[0]["path"]).write_bytes(b"no")
    assert nmke("cache", "verify").code == 7
    assert nmke("cache", "rm", listed[0]["name"]).code == 2
    assert nmke("cache", "rm", listed[0]["name"], "--yes").code == 0
    assert nmke("cache", "rm", "nothing", "--yes").code == 3
    assert nmke("cache", "rm", "--all", "--yes").code == 0
    assert nmke("cache", "ls", "--json").json["entries"] == []


@pytest.mark.parametrize("verb", [*VERBS, "cache"])
def test_every_verb_has_help(nmke: Nmke, verb: str) -> None:
    done = nmke(verb, "--help")
    assert done.code == 0 and "Usage: nmke " + verb in done.out


def test_bare_nmke_shows_help(nmke: Nmke) -> None:
    shown = nmke("--help")
    assert shown.code == 0 and all(verb in shown.out for verb in VERBS)
    assert nmke("--version").out.startswith("nmke ")


def test_demo_facts_are_spread_over_relations() -> None:
    chosen = choose_facts(12)
    assert len(chosen) == 12 == len({request.relation for request in chosen})
    assert all(request.paraphrases and request.neighborhood for request in chosen)
    assert len(choose_facts(10_000)) == len({request.id for request in choose_facts(10_000)})


def test_control_characters_never_reach_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    say("a\x1b[31m\x00b\tc 東京")
    assert capsys.readouterr().out == "a\ufffd[31m\ufffdb c 東京\n"
