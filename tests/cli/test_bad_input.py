"""Bad input: one line with file, line and field, exit code 3, nothing written."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tests.cli.conftest import FACTS, Nmke, write_facts

GOOD = FACTS[0]


def without(**changes: object) -> str:
    return json.dumps({**GOOD, **changes})


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "empty"),
        (json.dumps(GOOD) + "\n{broken\n", "line 2"),
        (without(prompt="The capital of Spain is"), "'prompt'"),
        (without(prompt="{} and {} is"), "2 places '{}'"),
        (without(prompt="France borders France and is"), "more than once"),
        (without(target_new=""), "'target_new'"),
        (without(target_new=None), "'target_new'"),
        (without(subject=" "), "names no subject"),
        (without(targt_new="x"), "did you mean 'target_new'"),
        (without(paraphrases=3), "'paraphrases'"),
        (without(neighborhood=[{"answer": "x"}]), "neighborhood"),
        (json.dumps(GOOD) + "\n" + json.dumps(GOOD), "line 2"),
        ("\xff\xfe", "line 1"),
    ],
)
def test_faults_in_a_facts_file(nmke: Nmke, source: Path, content: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "f.jsonl"
    file.write_bytes(content.encode("latin-1"))
    done = nmke("edit", source, "--facts", file, "-o", "run")
    assert done.code == 3, done.err
    assert len([line for line in done.err.splitlines() if line.startswith("error: ")]) == 1
    assert said in done.err and "f.jsonl" in done.err
    assert done.out == "" and not Path("run").exists()


@pytest.mark.parametrize(
    ("prompt", "target", "subject", "said"),
    [
        ("The capital of France is", "Lyon", None, "names no subject"),
        ("The capital of {France} is", " ", None, "target_new"),
        ("The capital of {France} is", "Lyon", "Spain", "is not in prompt"),
        ("{France} and {Spain} is", "Lyon", None, "2 '{...}' groups"),
        ("The capital of { } is", "Lyon", None, "empty subject"),
        ("word " * 2000 + "of {France} is", "Lyon", None, "the model reads 256"),
    ],
)
def test_faults_in_a_prompt(
    nmke: Nmke, source: Path, prompt: str, target: str, subject: str | None, said: str
) -> None:
    more = () if subject is None else ("-s", subject)
    done = nmke("edit", source, "-p", prompt, "-t", target, *more, "-o", "run")
    assert done.code == 3, done.err
    assert said in done.err and len(done.err.splitlines()[-1]) < 400
    assert not Path("run").exists()


def test_braces_and_unicode_in_a_prompt_are_text(nmke: Nmke, source: Path, settings: list[str]) -> None:
    prompt = "In JSON {'å': [1, {}]} the 東京 Zürich"
    refused = nmke("edit", source, "-p", prompt, "-t", "Ω", "-s", "東京", "-o", "run", *settings)
    assert refused.code == 0 or refused.code == 3
    done = nmke("edit", source, "-p", "In {'å': 1} the {} is", "-t", "Ω", "-s", "東京", "-o", "r", *settings)
    assert done.code == 0, done.err
    assert "Ω" in nmke("log", "r").out


def test_missing_sources_exit_3(
    nmke: Nmke, source: Path, facts: Path, settings: list[str], tmp_path: Path
) -> None:
    empty = tmp_path / "no-weights"
    empty.mkdir()
    (empty / "config.json").write_text((source / "config.json").read_text())
    for place in (empty, tmp_path / "gone/../nowhere at all", "./no such folder"):
        done = nmke("edit", place, "--facts", facts, "-o", "run", *settings)
        assert done.code == 3, done.err
    for verb in ("log", "undo", "verify", "eval"):
        done = nmke(verb, tmp_path, *(("--facts", facts) if verb == "eval" else ()))
        assert done.code == 3, done.err
    gone = nmke("edit", source, "--facts", tmp_path / "gone.jsonl", "-o", "run")
    assert gone.code == 3 and "gone.jsonl" in gone.err
    corpus = nmke(
        "edit", source, "--facts", facts, "-o", "run", "--corpus", "gone.txt", "--corpus-tokens", "200"
    )
    assert corpus.code == 3 and "gone.txt" in corpus.err
    assert not Path("run").exists()


def test_existing_output_needs_resume_or_force(
    nmke: Nmke, source: Path, facts: Path, settings: list[str], tmp_path: Path
) -> None:
    arguments = ("edit", source, "--facts", facts, "-o", "run", "--no-eval")
    assert nmke(*arguments, *settings).code == 0
    before = nmke("log", "run", "--json").json
    refused = nmke(*arguments, *settings)
    assert refused.code == 2 and "--resume" in refused.err and "--force" in refused.err
    assert nmke("log", "run", "--json").json == before
    assert nmke(*arguments, "--force", *settings).code == 0
    assert nmke("log", "run", "--json").json["content_hash"] == before["content_hash"]
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "letter.txt").write_text("dear")
    for flag in ("--force", "--resume"):
        refused = nmke("edit", source, "--facts", facts, "-o", mine, flag, *settings)
        assert refused.code == 2 and (mine / "letter.txt").is_file()
    other = tmp_path / "other-model"
    assert nmke("edit", other, "--facts", facts, "-o", "run", "--resume").code == 2


def test_unknown_edit_ids_and_formats_are_explained(nmke: Nmke, edited: str) -> None:
    for verb in ("show", "revert"):
        wrong = nmke(verb, "run", "nothing")
        assert wrong.code == 3 and "nmke log" in wrong.err
    assert nmke("undo", "run", "-n", 9).code == 3
    wrong = nmke("export", "run", "--to", "hg", "-o", "out")
    assert wrong.code == 2 and "hf" in wrong.err


def test_traceback_is_shown_only_when_asked(nmke: Nmke) -> None:
    assert "Traceback" not in nmke("log", "nowhere").err
    assert "Traceback" in nmke("log", "nowhere", "--traceback").err


def test_importing_the_command_line_does_not_import_torch() -> None:
    code = "import sys, nmke.cli.main; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_module_and_command_are_the_same_program() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "nmke", "--version"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and done.stdout.startswith("nmke ")


def test_package_names_are_lazy_and_complete() -> None:
    import nmke as package

    for name in package.__all__:
        assert getattr(package, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = package.nothing


def test_facts_of_two_files_are_scored_apart(
    nmke: Nmke, source: Path, facts: Path, settings: list[str], tmp_path: Path
) -> None:
    assert nmke("edit", source, "--facts", facts, "-o", "run", *settings).code == 0
    part = write_facts(tmp_path / "part.jsonl", FACTS[1:3])
    assert nmke("eval", "run", "--facts", part, "--json").json["n_facts"] == 2
    assert len(list(Path("run/base-outputs").glob("*.json"))) == 2
