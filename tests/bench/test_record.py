import json
from pathlib import Path

import pytest
from tests.bench.cells import cell, checkpoint

from nmke.bench.record import CellRecord, read_cells
from nmke.errors import RequestError


def test_a_saved_record_is_read_back_equal(tmp_path: Path) -> None:
    record = cell("nmke[mask=random]", points=[checkpoint([1.0, None, 0.5])])
    record.save(tmp_path / "a.json")
    assert CellRecord.load(tmp_path / "a.json") == record
    assert json.loads((tmp_path / "a.json").read_text())["schema"] == "nmke.bench_cell/1"


def test_numbers_that_are_not_finite_are_null_on_disk(tmp_path: Path) -> None:
    record = cell("nmke", points=[checkpoint([1.0], perplexity=float("inf"), kl=float("nan"))])
    record.save(tmp_path / "a.json")
    held_out = json.loads((tmp_path / "a.json").read_text())["checkpoints"][0]["held_out"]
    assert held_out["perplexity"] is None
    assert held_out["kl"] is None


def test_cells_are_found_in_the_benchmark_folder_and_in_the_cells_folder_itself(tmp_path: Path) -> None:
    for name in ("b", "a"):
        cell(name).save(tmp_path / "cells" / f"{name}.json")
    assert [record.identity.label for record in read_cells(tmp_path)] == ["a", "b"]
    assert read_cells(tmp_path / "cells") == read_cells(tmp_path)


def test_a_folder_without_cells_says_how_to_make_some(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="holds no benchmark cell; make some with `nmke bench run"):
        read_cells(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": "nmke.bench_cell/9"}, "is no nmke.bench_cell/1: schema"),
        ({"status": "fine"}, "status: input should be"),
        ({"colour": "red"}, "colour: extra inputs"),
    ],
)
def test_a_record_of_another_shape_is_refused_by_field(
    tmp_path: Path, change: dict[str, str], message: str
) -> None:
    path = tmp_path / "a.json"
    cell("nmke").save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(RequestError, match=message):
        CellRecord.load(path)


def test_a_cut_off_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    cell("nmke").save(path)
    path.write_text(path.read_text()[:100])
    with pytest.raises(RequestError, match="remove the file to run the cell again"):
        CellRecord.load(path)


def test_checkpoints_are_found_by_number_of_edits() -> None:
    points = [checkpoint([1.0]), checkpoint([1.0, 0.0])]
    record = cell("nmke", points=points)
    assert record.at(2) == points[1] == record.last
    assert record.at(3) is None
    assert cell("nmke").last is None
