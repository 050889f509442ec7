"""`nmke report` on a tiny run: one file, read from the record; the model is loaded once for its words and weights."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.bench.cells import cell, checkpoint
from tests.cli.conftest import Nmke
from tests.viz.test_neuron_page import record

from nmke.cli import report


@pytest.fixture
def run(made: Callable[[bool], Path], plain: None) -> Path:
    """A run that was scored, of the test's own."""
    return Path(shutil.copytree(made(True), "run"))


def never(*_: object, **__: object) -> None:
    raise AssertionError("the model was loaded")


def test_report_of_a_run_is_one_file_and_loads_the_model_once(
    nmke: Nmke, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path: path.read_bytes() for path in (*run.glob("edits/*"), *run.glob("head/*"))}
    done = nmke("report", run)
    assert done.code == 0, done.err
    assert "run/report.html" in done.out
    html = (run / "report.html").read_text(encoding="utf-8")
    for part in ("Before and after, in words", "France", "Tokyo", "figure-stream", "figure-drift", "figure-scores",
                 "figure-spectrum", "figure-columns", "figure-neurons", "teacher_forced/1",
                 "content hash"):  # fmt: skip
        assert part in html, part
    assert {path: path.read_bytes() for path in before} == before and nmke("verify", run).code == 0

    monkeypatch.setattr(report, "open_run", never)
    again = nmke("report", run, "--json").json
    assert again["schema"] == "nmke.report_files/1"
    assert again["files"][0]["bytes"] == (run / "report.html").stat().st_size < 5_000_000
    assert nmke("report", run, "-o", "other.html").code == 0
    refused = nmke("report", run, "-o", "other.html")
    assert refused.code == 2 and "--force" in refused.err
    assert nmke("report", run, "-o", "other.html", "--force").code == 0


def test_an_undone_batch_is_measured_anew(nmke: Nmke, run: Path) -> None:
    assert nmke("report", run).code == 0
    assert nmke("undo", run, "-n", "1").code == 0
    assert nmke("report", run).code == 0
    assert len(list((run / "report-data").iterdir())) == 2
    assert "1 batch taken back" in (run / "report.html").read_text(encoding="utf-8")


def test_without_the_model_its_words_are_left_out(
    nmke: Nmke, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "open_run", never)
    done = nmke("report", run, "--no-model")
    assert done.code == 0 and "left out" in done.err
    html = (run / "report.html").read_text(encoding="utf-8")
    assert "in words" not in html and "figure-stream" in html


def test_parts_as_json_and_csv(nmke: Nmke, run: Path) -> None:
    assert nmke("report", run, "--format", "json").code == 0
    content = json.loads((run / "report.json").read_text(encoding="utf-8"))
    assert content["schema"] == "nmke.report/1" and "stream" in content["figures"]
    done = nmke("report", run, "--format", "csv", "-o", "tables")
    assert done.code == 0, done.err
    names = {path.name for path in Path("tables").iterdir()}
    assert {"figure-stream.csv", "table-words.csv", "table-stability.csv"} <= names
    assert nmke("report", run, "--format", "csv", "-o", "tables").code == 2, "not empty"
    assert nmke("report", run, "--format", "html", "-o", "tables").code == 2, "a folder"
    wrong = nmke("report", run, "--format", "pdf")
    assert wrong.code == 2 and "html" in wrong.err


def test_pictures(nmke: Nmke, run: Path) -> None:
    pytest.importorskip("matplotlib")
    done = nmke("report", run, "--format", "png", "-o", "pictures", "--json")
    assert done.code == 0, done.err
    assert {f"figure-{name}.png" for name in done.json["figures"]} == {
        path.name for path in Path("pictures").iterdir()
    }


def test_neuron_record_beside_the_run_is_shown(nmke: Nmke, run: Path) -> None:
    assert nmke("report", run, "--no-model").code == 0
    assert "figure-neuron-map" not in (run / "report.html").read_text(encoding="utf-8")
    (run / "neurons.json").write_text(json.dumps(record()))
    assert nmke("report", run, "--no-model").code == 0
    assert "figure-neuron-map" in (run / "report.html").read_text(encoding="utf-8")
    assert nmke("report", run, "--no-model", "--neurons", "missing.json").code == 3


def test_report_of_a_benchmark(nmke: Nmke) -> None:
    folder = Path("board/cells")
    folder.mkdir(parents=True)
    points = [checkpoint([1.0, 0.0]), checkpoint([1.0, 0.0, 1.0])]
    for name in ("nmke", "alphaedit"):
        cell(name, points=points).save(folder / f"{name}.json")
    done = nmke("report", "board", "-o", "board.html")
    assert done.code == 0, done.err
    html = Path("board.html").read_text(encoding="utf-8")
    assert "figure-over-reliability" in html and "alphaedit" in html


def test_what_is_neither_run_nor_benchmark_is_refused(nmke: Nmke, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    done = nmke("report", tmp_path / "empty")
    assert done.code == 3 and "holds no benchmark cell" in done.err
    assert not (tmp_path / "empty" / "report.html").exists()


def test_damaged_measurements_are_named(nmke: Nmke, run: Path) -> None:
    assert nmke("report", run).code == 0
    path = next((run / "report-data").iterdir())
    path.write_text("{}")
    done = nmke("report", run)
    assert done.code == 1 and path.name in done.err and "remove it" in done.err


def test_a_run_without_edits_has_a_report(nmke: Nmke, run: Path) -> None:
    assert nmke("undo", run, "-n", "2").code == 0
    done = nmke("report", run)
    assert done.code == 0, done.err
    assert "Nothing is edited" in (run / "report.html").read_text(encoding="utf-8")
