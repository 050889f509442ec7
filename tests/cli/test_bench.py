"""`nmke bench`: run, table, compare, list of methods."""

from pathlib import Path

import pytest
import yaml
from tests.bench.cells import cell, checkpoint
from tests.cli.conftest import Nmke

from nmke.editors import methods


@pytest.fixture
def quick(tmp_path: Path, corpus: Path) -> Path:
    path = tmp_path / "quick.yaml"
    path.write_text(
        yaml.safe_dump({"corpus": str(corpus), "corpus_tokens": 300, "steps": 2, "layers": "1-2"})
    )
    return path


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """A benchmark of two methods that somebody ran."""
    folder = tmp_path / "finished"
    cell("nmke[mask=random]", points=[checkpoint([1.0, 1.0, 0.5])]).save(folder / "cells" / "a.json")
    cell("memit", points=[checkpoint([0.0, 0.5, 0.0])]).save(folder / "cells" / "b.json")
    return folder


def test_a_benchmark_runs_from_flags_and_goes_on_from_its_folder(
    nmke: Nmke, source: Path, facts: Path, quick: Path
) -> None:
    flags = ["--model", source, "--methods", "alphaedit[l2=1],unedited", "--data", facts, "--batch-sizes", 2]
    flags += ["--edits", 4, "--checkpoints", 2, "--held-out-tokens", 40, "-c", quick]
    planned = nmke("bench", "run", "-o", "b", *flags, "--dry-run", "--json").json
    assert [(c["label"], c["status"]) for c in planned["cells"]] == [
        ("alphaedit[l2=1]", "not begun"),
        ("unedited", "not begun"),
    ]
    stopped = nmke("bench", "run", "-o", "b", "--minutes", 0)
    assert stopped.code == 130
    assert "not finished; go on with: nmke bench run -o b" in stopped.err
    done = nmke("bench", "run", "-o", "b", "--json")
    assert done.code == 0
    assert done.json["schema"] == "nmke.bench_run/1"
    assert {c["status"] for c in done.json["cells"]} == {"done"}
    assert all(Path(c["record"]).is_file() for c in done.json["cells"])
    assert "2 edits, reliability" in done.err and "4 edits, reliability" in done.err
    rows = nmke("bench", "table", "b", "--json").json["rows"]
    assert [(row["label"], row["n_edits"], row["batch_size"]) for row in rows] == [
        ("alphaedit[l2=1]", 4, 2),
        ("unedited", 4, 2),
    ]
    assert nmke("bench", "--compare", "unedited", "alphaedit[l2=1]", "--in", "b").code == 0


def test_a_plan_that_somebody_wrote_is_run_as_it_stands(nmke: Nmke, tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    own = tmp_path / "b" / "plan.yaml"
    own.write_text("# why\nmodel: m\nmethods: [memit, 'nmke[mask=random]']\nseeds: [0, 1]\n")
    before = own.read_text()
    assert len(nmke("bench", "run", "-o", "b", "--dry-run", "--json").json["cells"]) == 4
    assert own.read_text() == before
    assert len(nmke("bench", "run", "-o", "b", "--seeds", "2", "--dry-run", "--json").json["cells"]) == 2
    assert yaml.safe_load(own.read_text())["seeds"] == [2]


def test_the_table_is_for_people_for_documents_and_for_programs(nmke: Nmke, finished: Path) -> None:
    shown = nmke("bench", "table", finished)
    assert shown.code == 0
    assert "counterfact, tiny, 3 edits, batches of 10, seed 0" in shown.out
    assert "teacher_forced/1, after the last edit; 95 % intervals over facts" in shown.out
    assert max(map(len, shown.out.splitlines())) <= 80
    assert "[mask=random]" in shown.out, "names are not broken"
    assert "| `memit` | 0.167 [" in nmke("bench", "table", finished, "--markdown").out
    made = nmke("bench", "table", finished, "--json", "--time", "after_batch").json
    assert (made["schema"], made["time"], len(made["rows"])) == ("nmke.bench_table/1", "after_batch", 2)


def test_two_methods_are_compared_pair_by_pair(nmke: Nmke, finished: Path) -> None:
    done = nmke("bench", "--compare", "nmke[mask=random]", "memit", "--in", finished)
    assert done.code == 0
    cells = ["reliability", "0.833", "0.167", "+0.667", "[+0.50,", "+1.00]", "3/0/0", "A"]
    assert cells in [line.split() for line in done.out.splitlines()]
    assert max(map(len, done.out.splitlines())) <= 80
    made = nmke("bench", "--compare", "nmke[mask=random]", "memit", "--in", finished, "--json").json
    assert made["schema"] == "nmke.bench_compare/1"
    (one,) = made["comparisons"]
    assert one["differences"][0]["difference"]["mean"] == pytest.approx(2 / 3)
    assert one["differences"][0]["verdict"] == "A higher"


def test_methods_are_listed_with_source_and_needs(nmke: Nmke) -> None:
    found = nmke("bench", "--list-methods", "--json").json["methods"]
    assert [method["name"] for method in found] == list(methods.names())
    for method in found:
        assert method["source"] and isinstance(method["needs"], list)
    assert {m["name"]: m["needs"] for m in found}["alphaedit"] == ["key statistics"]
    listed = nmke("bench", "--list-methods")
    assert "alphaedit" in listed.out and "arXiv" in listed.out


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("run", "-o", "b"), 2, "setting 'model' is missing"),
        (("run", "-o", "b", "--model", "m", "--methods", "nmk"), 2, "did you mean 'nmke'"),
        (("run", "-o", "b", "--model", "m", "--methods", "nmke", "--records", "x"), 2, "is no span"),
        (("table", "nowhere"), 3, "holds no benchmark cell"),
        (("--compare", "a", "b", "--in", "nowhere"), 3, "holds no benchmark cell"),
        (("--list-methods", "table", "x"), 2, "stand alone"),
        (("--compare", "a"), 2, "--help"),
    ],
)
def test_wrong_use_is_one_line_with_its_cure(
    nmke: Nmke, arguments: tuple[str, ...], code: int, message: str
) -> None:
    done = nmke("bench", *arguments)
    assert done.code == code
    assert message in done.err
    assert not Path("b").exists()


def test_bench_alone_shows_its_help(nmke: Nmke) -> None:
    done = nmke("bench")
    assert done.code == 0
    assert "--list-methods" in done.out and "table" in done.out
