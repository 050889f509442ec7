"""The HTML file: self-contained, escaped, complete, small; and its parts."""

import csv
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from tests.bench.cells import cell, checkpoint
from tests.viz import pages

from nmke.errors import ExportError
from nmke.events import EditRecord
from nmke.viz.bench_page import bench_report
from nmke.viz.parts import as_json, csv_files, write_files
from nmke.viz.report import LARGEST_FILE, Report, Section, Table, render
from nmke.viz.run_page import run_report
from nmke.viz.run_record import facts_jsonl


class Seen(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def made(**changes: Any) -> Report:
    given = {"run": pages.run(), "texts": pages.texts(), "stability": pages.stability(), "made": "Made now."}
    return run_report(**{**given, **changes})


def bench() -> Report:
    points = [checkpoint([1.0, 0.5]), checkpoint([1.0, 0.5, 1.0, 0.0])]
    cells = [cell(name, points=points, seed=seed) for name in ("nmke", "alphaedit") for seed in (0, 1)]
    wide = ("nmke[mask=random]", "MMMM WWWW mmmm wwww @@@@ %%%% MEMIT[covariance_weight=15000]")
    cells += [cell(name, points=points, batch_size=100) for name in wide]
    cells.append(cell("wise", points=points, batch_size=1, status="collapsed", reason="perplexity"))
    return bench_report(Path("board"), cells, made="Made now.")


@pytest.mark.parametrize("report", [made(), bench()], ids=["run", "bench"])
def test_nothing_is_fetched_and_nothing_runs(report: Report) -> None:
    html = render(report)
    seen = Seen(html)
    for tag, attributes in seen.tags:
        assert tag not in ("script", "iframe", "object", "img", "base", "form")
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href", "xlink:href", "action", "data", "poster"):
            assert str(attributes.get(name, "#")).startswith(("#", "data:"))
    assert "url(" not in html and "@import" not in html
    assert "default-src 'none'" in html


@pytest.mark.parametrize("report", [made(), bench()], ids=["run", "bench"])
def test_every_figure_and_table_is_there(report: Report) -> None:
    seen = Seen(render(report))
    ids = [attributes["id"] for _, attributes in seen.tags if attributes.get("id")]
    assert len(ids) == len(set(ids))
    assert {f"figure-{figure.id}" for figure in report.figures} <= set(ids)
    assert {f"table-{table.id}" for table in report.tables} <= set(ids)
    assert sum(attributes.get("class") == "chart" for _, attributes in seen.tags) == len(report.figures) > 5
    for _, attributes in seen.tags:
        target = attributes.get("href") or ""
        assert not target.startswith("#") or target[1:] in ids


def test_what_users_and_models_wrote_stays_text() -> None:
    hostile = pages.HOSTILE
    run = pages.run(root=Path(hostile.replace("\x00", "").replace("/", "")))
    fact = pages.request(1, subject=hostile, target_new=hostile, target_true=hostile, id="<b>id</b>")
    record = EditRecord(
        fact, "failed", {"probability_before": 0.0, "probability_after": 0.1, "reason": hostile}
    )
    texts = [
        {**probe, "prompt": hostile, "after": {"text": hostile, "p_new": 0.1}} for probe in pages.texts()
    ]
    html = render(made(run=replace(run, held=(record,), recipe=hostile), texts=texts))
    seen = Seen(html)
    assert not [tag for tag, _ in seen.tags if tag in ("script", "img", "b")]
    assert "{{ 7*7 }}" in seen.text and "49" not in html.split("</style>")[1].split("<svg")[0]
    assert "\u202e" not in html and "\x00" not in html
    assert html.count("</style>") == 1


def test_before_and_after_are_marked() -> None:
    words = next(table for table in made().tables if table.id == "words")
    kinds = [row[3].kind for row in words.cells()]
    assert kinds == ["good", "bad", "good", "bad"]
    assert Seen(render(made())).text.count("✗") >= 2


def test_report_says_first_that_facts_were_changed() -> None:
    text = Seen(render(made())).text
    assert text.index("changed on purpose") < text.index("Before and after")
    empty = made(run=replace(pages.run(), batches=(), held=(), events=()), texts=(), stability={})
    assert "Nothing is edited" in Seen(render(empty)).text


def test_tiles_say_how_many_neurons_an_edit_or_a_batch_writes() -> None:
    tiles = {label: value for label, value, _ in made().tiles}
    assert tiles["neurons that may change"] == "62%" and "neurons per edit" not in tiles
    run = pages.run()
    for batch in run.batches:
        for detail in batch.event.body["masks"].values():
            detail["kept_per_edit"] = 16.0
    tiles = {label: f"{value}; {remark}" for label, value, remark in made(run=run).tiles}
    assert tiles["neurons per edit"] == "25%; of each edited layer; a whole batch 62%"


def test_a_long_run_stays_under_the_limit() -> None:
    html = render(made(run=pages.run(batches=700, size=10)))
    assert len(html.encode()) < LARGEST_FILE / 2
    assert "7000 facts that the model holds now, the first 500" in html or "6999 facts" in html


def test_too_large_a_report_is_refused() -> None:
    table = Table("big", ("a",), tuple(("x" * 1000,) for _ in range(6000)))
    with pytest.raises(ExportError, match=r"the report would have 6\.\d MB"):
        render(Report("t", "", "", (), (Section("s", "S", tables=(table,)),), ""))


def test_facts_and_recipe_are_carried_as_they_can_be_read_again(tmp_path: Path) -> None:
    import base64

    from nmke.facts import read_facts

    found = dict(re.findall(r'download="([^"]+)" href="data:[^,]+,([^"]+)"', render(made())))
    assert set(found) == {"facts.jsonl", "recipe.yaml"}
    path = tmp_path / "facts.jsonl"
    path.write_bytes(base64.b64decode(found["facts.jsonl"]))
    given = [record.request for batch in pages.run().batches for record in batch.event.edits]
    assert list(read_facts(path).requests) == given
    assert facts_jsonl(()) == ""
    assert csv_files(made())["facts.jsonl"].encode() == path.read_bytes()


def test_facts_too_large_to_be_carried_are_named_and_written_with_the_tables(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("nmke.viz.report.LARGEST_DOWNLOAD", 100)
    html = render(made())
    assert 'download="facts.jsonl"' not in html and "facts.jsonl is too large" in html
    assert 'download="recipe.yaml"' in html
    assert "Land 1" in csv_files(made())["facts.jsonl"]


def test_a_run_without_a_recipe_carries_its_settings_as_one(tmp_path: Path) -> None:
    from nmke.config import EditConfig, read_config

    given = EditConfig.create(method="alphaedit", l2=3.0, layers=(4, 5), batch_size=7)
    run = replace(pages.run(), recipe="")
    for batch in run.batches:
        batch.event.body["config"] = given.model_dump(mode="json")
    path = tmp_path / "recipe.yaml"
    path.write_text(csv_files(made(run=run))["recipe.yaml"])
    assert EditConfig.create(**read_config(path)) == given


def test_a_fact_that_was_edited_twice_is_carried_once() -> None:
    run = pages.run(batches=1, size=1)
    twice = replace(run, batches=(run.batches[0], replace(run.batches[0], first=1)))
    assert len(csv_files(made(run=twice))["facts.jsonl"].splitlines()) == 1


def test_json_holds_every_figure_and_no_number_that_json_lacks() -> None:
    run = pages.run()
    run.batches[1].event.body["health"]["kl"] = float("inf")
    content = as_json(made(run=run))
    text = json.dumps(content, allow_nan=False)
    assert json.loads(text)["schema"] == "nmke.report/1"
    assert set(content["figures"]) == {figure.id for figure in made().figures}
    assert content["figures"]["kl"]["series"][0]["y"][1] is None
    assert content["tables"]["words"][0]["new answer"] == "Lyon"
    assert content["about"]["stability"]["layers"]["4"]["wasserstein"] == 0.03


def test_csv_files_hold_the_same_numbers() -> None:
    files = csv_files(made())
    rows = list(csv.DictReader(io.StringIO(files["figure-stream.csv"])))
    assert (
        rows[0]["series"] == "right after its batch"
        and float(rows[0]["x"]) == 5
        and float(rows[0]["low"]) < 0.8
    )
    rows = list(csv.DictReader(io.StringIO(files["figure-neuron-use.csv"])))
    assert {"x", "y", "value"} == set(rows[0])
    assert "table-words.csv" in files


def test_a_spreadsheet_runs_no_formula_out_of_a_csv() -> None:
    texts = [{**pages.texts()[0], "prompt": prompt} for prompt in ("=cmd|' /C calc'!A0", "a\x00b")]
    rows = list(csv.DictReader(io.StringIO(csv_files(made(texts=texts))["table-words.csv"])))
    assert rows[0]["prompt"] == "'=cmd|' /C calc'!A0"
    assert rows[1]["prompt"] == "a\ufffdb", "csv writers before Python 3.11 refuse NUL"


def test_files_are_written(tmp_path: Path) -> None:
    found = write_files(tmp_path / "new", {"a.csv": "ä\n", "b.png": b"\x00"})
    assert found[0].read_text(encoding="utf-8") == "ä\n" and found[1].read_bytes() == b"\x00"


def test_bench_tells_methods_seeds_and_batch_sizes_apart() -> None:
    report = bench()
    batches = [section.title.rsplit(" ", 1)[-1] for section in report.sections][:3]
    assert batches == ["1", "10", "100"]
    figures = {figure.id: figure for figure in report.figures}
    now = figures["tiny-counterfact-10-reliability"]
    assert now.y.categories == ("alphaedit", "nmke")
    after = now.series[1]
    assert len(after.x) == 4 and set(after.x) == {0.625}
    assert sorted(round(place, 2) for place in after.y if place is not None) == [-0.15, 0.15, 0.85, 1.15]
    curve = figures["tiny-counterfact-10-over-reliability"]
    assert [line.name for line in curve.series] == ["alphaedit", "nmke"]
    assert curve.series[0].x == (2.0, 4.0) and curve.series[0].y == (0.75, 0.625)
    assert "tiny-counterfact-10-generalization" not in figures, "nothing was measured"
    states = [row[2].text for table in report.tables if table.id.endswith("cells") for row in table.cells()]
    assert states == ["collapsed", *["done"] * 6]
    with_reason = next(table for table in report.tables if table.id == "identity")
    assert "perplexity" in {row[-1].text for row in with_reason.cells()}


def test_bench_with_many_methods_draws_the_best_and_those_that_must_not_be_missing() -> None:
    cells = [cell(f"m{i}", points=[checkpoint([1.0] * 2), checkpoint([i / 10] * 4)]) for i in range(9)]
    cells.append(cell("nmke", points=[checkpoint([0.0] * 2), checkpoint([0.0] * 4)]))
    cells.append(cell("just-begun", status="running"))
    report = bench_report(Path("board"), cells, made="")
    figures = {figure.id: figure for figure in report.figures}
    assert [line.name for line in figures["over-reliability"].series] == [
        "m4",
        "m5",
        "m6",
        "m7",
        "m8",
        "nmke",
    ]
    assert "further method" in figures["over-reliability"].caption
    assert len(figures["reliability"].y.categories) == 11
    assert Seen(render(report)).text.count("just-begun") >= 1
