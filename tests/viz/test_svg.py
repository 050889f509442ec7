"""Charts as SVG: well-formed, escaped, inside their frame, and with a tooltip on every mark."""

import re
from xml.etree import ElementTree

import pytest
from tests.viz import pages

from nmke.viz.charts import run_figures
from nmke.viz.figures import Axis, Figure, Heat, Series
from nmke.viz.stability_charts import stability_figures
from nmke.viz.svg import WIDTH, draw, swatch

FIGURES = [*run_figures(pages.run()), *stability_figures(pages.stability())]


def parsed(figure: Figure) -> ElementTree.Element:
    return ElementTree.fromstring(draw(figure))


@pytest.mark.parametrize("figure", FIGURES, ids=lambda figure: figure.id)
def test_every_chart_is_well_formed_and_inside_its_frame(figure: Figure) -> None:
    root = parsed(figure)
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    for element in root.iter():
        for name in ("x", "x1", "x2", "cx"):
            assert -0.6 <= float(element.get(name, 0)) <= width + 0.6, ElementTree.tostring(element)
        for name in ("y", "y1", "y2", "cy"):
            assert -0.6 <= float(element.get(name, 0)) <= height + 0.6, ElementTree.tostring(element)
    words = [element.text for element in root.iter("text")]
    assert not figure.x.label or figure.x.label in words
    assert not figure.y.label or figure.y.label in words or figure.heat


def test_what_a_user_wrote_stays_text() -> None:
    series = Series(pages.HOSTILE.replace("\x00", ""), (0.0, 1.0), (0.2, 0.4), mark="dots")
    categories = Axis(pages.HOSTILE.replace("\x00", ""), categories=("<b>a</b>", "]]>"))
    shown = Figure("f", "<i>", '" onload="x', categories, Axis("y"), (series,))
    text = draw(shown)
    assert "<img" not in text and "<b>" not in text and "<i>" not in text
    tags = {element.tag for element in ElementTree.fromstring(text).iter()}
    assert tags <= {"svg", "g", "text", "line", "circle", "title"}
    assert set(ElementTree.fromstring(text).attrib) == {
        "class",
        "viewBox",
        "role",
        "aria-label",
        "preserveAspectRatio",
    }


def test_marks_stand_where_the_numbers_say() -> None:
    root = parsed(Figure("f", "F", "", Axis("x", low=0.0, high=10.0), Axis("y", low=0.0, high=1.0),
                         (Series("a", (0.0, 10.0), (0.0, 1.0), mark="dots"),)))  # fmt: skip
    first, last = root.iter("circle")
    grid = [float(e.attrib["y1"]) for e in root.iter("line") if e.attrib["class"] == "grid"]
    assert float(first.attrib["cy"]) == max(grid) and float(last.attrib["cy"]) == min(grid)
    assert float(last.attrib["cx"]) > float(first.attrib["cx"])
    assert [e.text for e in root.iter("title")] == ["a: 0 at 0", "a: 1 at 10"]


def test_intervals_are_drawn() -> None:
    band = Series("a", (0.0, 1.0), (0.5, 0.6), (0.4, 0.5), (0.6, 0.7))
    assert 'class="band"' in draw(Figure("f", "F", "", Axis("x"), Axis("y"), (band,)))
    lone = Series("a", (0.0,), (0.5,), (0.4,), (0.6,))
    text = draw(Figure("f", "F", "", Axis("x"), Axis("y"), (lone,)))
    assert 'class="whisker"' in text and "95 %: 0.400 to 0.600" in text
    rows = Series("a", (0.5,), (0.0,), (0.4,), (0.6,), mark="dots")
    whisker = next(e for e in parsed(Figure("f", "F", "", Axis("x"), Axis("", ("row",)), (rows,))).iter("line")
                   if e.attrib["class"] == "whisker")  # fmt: skip
    assert whisker.attrib["y1"] == whisker.attrib["y2"] and whisker.attrib["x1"] != whisker.attrib["x2"]


def test_a_gap_breaks_the_line() -> None:
    series = Series("a", (0.0, 1.0, 2.0, 3.0, 4.0), (1.0, 2.0, None, 2.0, float("inf")))
    lines = [
        e.attrib["points"].split()
        for e in parsed(Figure("f", "F", "", Axis("x"), Axis("y"), (series,))).iter("polyline")
    ]
    assert [len(points) for points in lines] == [2, 1]


def test_bars_of_one_place_are_stacked() -> None:
    stack = tuple(
        Series(n, (1.0,), (v,), mark="bars", colour=i) for i, (n, v) in enumerate((("a", 1.0), ("b", 2.0)))
    )
    low, high = parsed(Figure("f", "F", "", Axis("x"), Axis("y", low=0.0), stack)).iter("rect")
    assert float(high.attrib["y"]) + float(high.attrib["height"]) == pytest.approx(
        float(low.attrib["y"]), abs=0.11
    )
    assert float(high.attrib["height"]) == pytest.approx(2 * float(low.attrib["height"]), abs=0.21)


def test_a_map_shades_by_value_and_leaves_gaps() -> None:
    heat = Heat(((0.0, 0.5), (None, 1.0)), "share")
    root = parsed(Figure("f", "F", "", Axis("x", ("a", "b")), Axis("", ("1", "2")), heat=heat))
    shades = [re.search(r"(\d+)%", e.attrib["style"]) for e in root.iter("rect")]
    assert [s and s[1] for s in shades] == ["0", "50", "100"]


@pytest.mark.parametrize("figure", FIGURES, ids=lambda figure: figure.id)
def test_every_series_has_a_swatch(figure: Figure) -> None:
    for number, series in enumerate(figure.series):
        assert len(list(ElementTree.fromstring(swatch(series, number)))) >= 1


def test_long_names_of_rows_leave_room_for_the_marks() -> None:
    names = tuple("nmke[mask=random,attribution=lps] " * 3 for _ in range(3))
    root = parsed(
        Figure("f", "F", "", Axis("x"), Axis("", names), (Series("a", (0.1, 0.9), (0.0, 1.0), mark="dots"),))
    )
    grid = next(
        e for e in root.iter("line") if e.attrib["class"] == "grid" and e.attrib["y1"] == e.attrib["y2"]
    )
    assert float(grid.attrib["x1"]) < WIDTH / 2
