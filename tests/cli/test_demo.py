"""The whole demo on a tiny model: edits, undoes, redoes, and leaves a run, a model and a report."""

from pathlib import Path

import pytest
from tests.cli.conftest import Nmke

from nmke.cli import demo


def test_demo_leaves_a_report_with_the_words_it_showed(
    nmke: Nmke, source: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = {
        "batch_size": 2,
        "steps": 2,
        "corpus": str(corpus),
        "corpus_tokens": 300,
        "on_collapse": "continue",
    }
    monkeypatch.setattr(demo, "MODEL", str(source))
    monkeypatch.setattr(demo, "SETTINGS", quick)
    done = nmke("demo", "--limit", "3")
    assert done.code == 0, done.err
    assert "the same as before" in done.out and "nmke-demo/run/report.html" in done.out
    html = Path("nmke-demo/run/report.html").read_text(encoding="utf-8")
    assert "Before and after, in words" in html and "figure-spectrum" in html and "teacher_forced/1" in html
    assert demo.choose_facts(3)[0].subject in html
    assert Path("nmke-demo/model/README.md").is_file()
    assert nmke("verify", "nmke-demo/run").code == 0
