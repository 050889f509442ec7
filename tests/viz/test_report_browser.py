"""The report in a real Chromium: silent, alone, complete and readable, on a phone and on a desk, light and dark."""

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tests.viz.test_neuron_page import record
from tests.viz.test_report import bench, made

from nmke.viz.neuron_page import neuron_section
from nmke.viz.report import Report, render

pytestmark = pytest.mark.browser
WIDTHS = (400, 1400)
SCHEMES = ("light", "dark")
REPORTS = {"run": made(neurons=neuron_section(record())), "bench": bench()}
# Of every figure: its box, the chart's frame, and each text's box inside the chart.
FIGURES = """() => [...document.querySelectorAll('figure')].map(figure => {
  const svg = figure.querySelector('svg.chart'), frame = svg.getBoundingClientRect();
  const box = r => [r.left, r.top, r.right, r.bottom];
  return {id: figure.id, figure: box(figure.getBoundingClientRect()), frame: box(frame),
    texts: [...svg.querySelectorAll('text')].map(t => [t.textContent, ...box(t.getBoundingClientRect())]),
    marks: svg.querySelectorAll('polyline, circle, polygon, rect, line:not(.grid)').length};
})"""
# Every element whose own text is wider than the room it is given, and every one that reaches beyond the page.
CLIPPED = """() => [...document.querySelectorAll('body *')].filter(e => !e.closest('svg') && e.getClientRects().length)
  .filter(e => e.closest('thead') === null || getComputedStyle(e.closest('thead')).position !== 'absolute')
  .filter(e => e.getBoundingClientRect().right > window.innerWidth + 1
    || (e.scrollWidth > e.clientWidth + 1 && getComputedStyle(e).display !== 'inline' && e.clientWidth > 0))
  .map(e => `${e.tagName}.${e.className} ${e.textContent.slice(0, 60)}`)"""
SMALLEST_TEXT = 9.0  # px on the screen


@dataclass
class Opened:
    """A page, what it said on the console, and what it asked for."""

    page: Any
    said: list[str]
    asked: list[str]


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    path = os.environ.get("CHROMIUM") or shutil.which("chromium")
    if path is None and not os.environ.get("CI"):
        pytest.skip("no chromium here; install Debian's, or name one in CHROMIUM")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(
    params=[(n, w, s) for n in REPORTS for w in WIDTHS for s in SCHEMES], ids=lambda p: "-".join(map(str, p))
)
def opened(request: pytest.FixtureRequest, chromium: Any, tmp_path: Path) -> Iterator[tuple[Report, Opened]]:
    name, width, scheme = request.param
    file = tmp_path / "report.html"
    file.write_text(render(REPORTS[name]), encoding="utf-8")
    page = chromium.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    seen = Opened(page, [], [])
    page.on("console", lambda message: seen.said.append(message.text))
    page.on("pageerror", lambda error: seen.said.append(str(error)))
    page.on("request", lambda asked: seen.asked.append(asked.url))
    page.goto(file.as_uri())
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    yield REPORTS[name], seen
    page.close()


def test_report_is_silent_alone_complete_and_unclipped(opened: tuple[Report, Opened]) -> None:
    report, seen = opened
    assert seen.said == []
    assert [url for url in seen.asked if not url.startswith("data:")] == [seen.page.url]
    assert seen.page.evaluate("document.documentElement.scrollWidth") <= seen.page.viewport_size["width"]
    assert seen.page.evaluate(CLIPPED) == []

    figures = {found["id"]: found for found in seen.page.evaluate(FIGURES)}
    assert set(figures) == {f"figure-{figure.id}" for figure in report.figures}
    for name, found in figures.items():
        left, top, right, bottom = found["frame"]
        assert right - left > 250 and bottom - top > 60, (name, found["frame"])
        assert found["marks"] > 0, name
        for text, a, b, c, d in found["texts"]:
            assert a >= left - 1 and b >= top - 1 and c <= right + 1 and d <= bottom + 1, (name, text)
            assert d - b >= SMALLEST_TEXT, (name, text, d - b)


def test_texts_of_a_chart_do_not_lie_on_each_other(opened: tuple[Report, Opened]) -> None:
    for found in opened[1].page.evaluate(FIGURES):
        texts = found["texts"]
        for i, (text, a, b, c, d) in enumerate(texts):
            for other, e, f, g, h in texts[i + 1 :]:
                across, up = min(c, g) - max(a, e), min(d, h) - max(b, f)
                assert across < 1 or up < 3, (found["id"], text, other)


def test_colours_follow_the_scheme(opened: tuple[Report, Opened]) -> None:
    page = opened[1].page
    dark = page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert ground == ("rgb(20, 23, 28)" if dark else "rgb(255, 255, 255)")
    blue = page.evaluate("getComputedStyle(document.querySelector('svg.chart .dot, svg.chart .line')).fill")
    assert blue != "rgb(0, 0, 0)"


def test_print_is_light_and_shows_what_is_folded(chromium: Any, tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    file.write_text(render(REPORTS["run"]), encoding="utf-8")
    page = chromium.new_page(color_scheme="dark")
    page.goto(file.as_uri())
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.locator("#table-settings").bounding_box()["height"] > 50
    assert page.locator("nav").is_hidden()
    assert len(page.pdf(format="A4")) > 20_000
    page.close()


def test_carried_facts_can_be_saved(chromium: Any, tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    file.write_text(render(REPORTS["run"]), encoding="utf-8")
    page = chromium.new_page()
    page.goto(file.as_uri())
    with page.expect_download() as waiting:
        page.get_by_role("link", name="facts.jsonl").click()
    lines = Path(waiting.value.path()).read_text(encoding="utf-8").splitlines()
    assert waiting.value.suggested_filename == "facts.jsonl" and json.loads(lines[0])["subject"] == "Land 0"
    page.close()
