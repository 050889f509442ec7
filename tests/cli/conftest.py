"""A tiny saved model, a corpus, facts, and one way to run a command in this process."""

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tests.tiny import save_tiny, tiny_llama

from nmke.cli.main import run

FACTS = [
    {
        "id": f"f{number}",
        "prompt": "The capital of {} is",
        "subject": subject,
        "target_new": target,
        "paraphrases": [f"{subject} has its seat of government in"],
        "neighborhood": [{"prompt": f"The capital of {other} is", "answer": "Rome"}],
    }
    for number, (subject, target, other) in enumerate(
        [
            ("France", "Tokyo", "Italy"),
            ("Japan", "Paris", "Spain"),
            ("Poland", "Apple", "Italy"),
            ("Emma", "Cook", "Spain"),
        ]
    )
]


@dataclass(frozen=True)
class Done:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        return dict(json.loads(self.out))


Nmke = Callable[..., Done]


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No colours, 80 columns, no settings from outside, and a current folder of the test's own."""
    for name in ("NMKE_DTYPE", "NMKE_DEVICE", "NMKE_METHOD", "NMKE_BATCH_SIZE", "NMKE_STEPS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tiny model of four layers."""
    return save_tiny(tmp_path_factory.mktemp("cli") / "tiny", tiny_llama, num_hidden_layers=4)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    path.write_text(
        "The capital of Italy is Rome, and the old harbour is near the train. You and I walked.\n" * 40
    )
    return path


@pytest.fixture(scope="session")
def tiny_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def facts(tmp_path: Path) -> Path:
    return write_facts(tmp_path / "facts.jsonl")


def write_facts(path: Path, facts: list[dict[str, Any]] | None = None) -> Path:
    path.write_text("".join(json.dumps(fact) + "\n" for fact in (FACTS if facts is None else facts)))
    return path


@pytest.fixture(scope="session")
def made(
    tmp_path_factory: pytest.TempPathFactory, source: Path, corpus: Path, tiny_cache: Path
) -> Callable[[bool], Path]:
    """Edits the four facts in two batches, once with scores and once without, for tests that begin with such a run."""

    @cache
    def make(scored: bool) -> Path:
        folder = tmp_path_factory.mktemp("made")
        flags = ["-o", str(folder / "run"), *quick_flags(corpus), *([] if scored else ["--no-eval"])]
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("NMKE_CACHE", str(tiny_cache))
            patch.setenv("NO_COLOR", "1")
            assert (
                run(["edit", str(source), "--facts", str(write_facts(folder / "facts.jsonl")), *flags]) == 0
            )
        return folder / "run"

    return make


@pytest.fixture
def edited(made: Callable[[bool], Path], plain: None) -> str:
    """The folder "run" of the test's own, with two batches of two facts, not scored."""
    return str(shutil.copytree(made(False), "run"))


@pytest.fixture
def settings(corpus: Path) -> list[str]:
    """Flags that make an edit of the tiny model take a fraction of a second."""
    return quick_flags(corpus)


def quick_flags(corpus: Path) -> list[str]:
    return [
        "--corpus",
        str(corpus),
        "--corpus-tokens",
        "300",
        "--steps",
        "4",
        "--batch-size",
        "2",
        "--on-collapse",
        "continue",
    ]


@pytest.fixture
def nmke(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tiny_cache: Path
) -> Iterator[Nmke]:
    """Runs `nmke ARGUMENTS`, with a cache of its own."""
    monkeypatch.setenv("NMKE_CACHE", str(tiny_cache))

    def call(*arguments: object) -> Done:
        capsys.readouterr()
        code = run([str(argument) for argument in arguments])
        said = capsys.readouterr()
        return Done(code, said.out, said.err)

    level = logging.getLogger("nmke").level
    yield call
    assert logging.getLogger("nmke").level == level
