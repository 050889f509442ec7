"""Figures as inline SVG: coloured by the page's style sheet, so that they follow light, dark and print.

Drawn for a column of 360 px, so that the text is as large on a phone as on a desk. Every mark carries a tooltip.
Everything that is text is escaped here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from html import escape

from nmke.viz.figures import Figure, Heat, Series
from nmke.viz.palette import DASHES
from nmke.viz.scales import Scale, label, limits, spacing

WIDTH, HEIGHT = 360.0, 240.0
TOP, BOTTOM, RIGHT = 26.0, 36.0, 12.0
ROW = 24.0  # height of a row, where the y axis has categories
# Widths of letters in px at the style sheet's 10.5 px, of DejaVu Sans, which is wider than most.
LETTER, WIDE, NARROW = 6.9, 10.6, 4.3
WIDE_LETTERS, NARROW_LETTERS = frozenset("mwMW%@—…"), frozenset(" ijlftrI.,;:'|[]()-")
NAME_LETTERS = 20
FEW = 40  # points up to which a line has markers
X_LABEL_ROOM = 46.0


@dataclass(frozen=True)
class Frame:
    """The area of the marks, with both scales."""

    x: Scale
    y: Scale
    height: float


def draw(figure: Figure) -> str:
    """The chart as one `<svg>` element."""
    frame = _frame(figure)
    described = escape(f"{figure.title}. {figure.caption}")
    body = [_grid(figure, frame)]
    body += [_cells(figure, figure.heat, frame)] if figure.heat else [_series(figure, frame)]
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH:g} {frame.height:g}" role="img" '
        f'aria-label="{described}" preserveAspectRatio="xMidYMid meet">{"".join(body)}</svg>'
    )


def swatch(series: Series, number: int) -> str:
    """The series' mark, for a legend."""
    paint = _paint(series, number)
    if series.mark in ("dots", "rings"):
        inside = _marker(series, number, 13, 6, "")
    elif series.mark == "bars":
        inside = f'<rect class="bar" x="4" y="1" width="18" height="10"{paint}/>'
    elif series.mark == "arrows":
        shaft = f'<line class="arrow" x1="4" y1="6" x2="20" y2="6"{paint}/>'
        inside = f'{shaft}<circle class="dot" cx="20" cy="6" r="2"{paint}/>'
    else:
        inside = f'<line class="{_line_class(series)}" x1="0" y1="6" x2="26" y2="6"{paint}/>'
    return f'<svg class="swatch" viewBox="0 0 26 12" width="26" height="12" aria-hidden="true">{inside}</svg>'


def _frame(figure: Figure) -> Frame:
    rows = len(figure.y.categories)
    height = TOP + rows * ROW + BOTTOM if rows else HEIGHT
    x_ends, y_ends = limits(figure, "x"), limits(figure, "y")
    # Rows are named from the top down.
    y = Scale(figure.y, *y_ends, *((TOP, height - BOTTOM) if rows else (height - BOTTOM, TOP)))
    widest = max((_width(line) for _, text in y.ticks() for line in _lines(text)), default=0.0)
    return Frame(Scale(figure.x, *x_ends, widest + 12.0, WIDTH - RIGHT), y, height)


def _grid(figure: Figure, frame: Frame) -> str:
    left, right, bottom = frame.x.start, frame.x.end, frame.height - BOTTOM
    parts = [_text(2, 12, figure.y.label, "axis")] if figure.y.label else []
    for value, name in frame.y.ticks():
        at = frame.y(value)
        if not figure.heat:
            parts.append(f'<line class="grid" x1="{left:.1f}" x2="{right:.1f}" y1="{at:.1f}" y2="{at:.1f}"/>')
        lines = _lines(name)
        for place, line in enumerate(lines):
            parts.append(_text(left - 6, at + 4 + 11 * (place - (len(lines) - 1) / 2), line, "tick end"))
    ends = 0.0
    for value, name in _fitting(frame.x):
        at, half = frame.x(value), _width(name) / 2
        if figure.y.categories and not figure.heat:
            parts.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP:g}" y2="{bottom:.1f}"/>')
        centre = min(max(at, half), WIDTH - half - 1)
        if centre - half >= ends:
            parts.append(_text(centre, bottom + 15, name, "tick middle"))
            ends = centre + half + 4
    parts.append(_text(right, frame.height - 6, figure.x.label, "axis end"))
    return "".join(parts)


def _fitting(scale: Scale) -> list[tuple[float, str]]:
    """The ticks, thinned evenly until their labels fit."""
    ticks = scale.ticks()
    room = abs(scale.end - scale.start) / max(1, len(ticks))
    widest = max((_width(name) for _, name in ticks), default=0.0) + 6
    every = max(1, -int(-widest // room))
    return ticks[::every]


def _series(figure: Figure, frame: Frame) -> str:
    parts: list[str] = []
    base: dict[float, float] = {}
    for number, series in enumerate(figure.series):
        if series.mark == "bars":
            parts.append(_bars(figure, series, number, frame, base))
        else:
            parts.append(f"<g>{MARKS[series.mark](figure, series, number, frame)}</g>")
    return "".join(parts)


def _line(figure: Figure, series: Series, number: int, frame: Frame) -> str:
    paint, parts = _paint(series, number), []
    for run in _unbroken(series):
        ends = [(x, series.interval(n)) for n, x, _ in run]
        if len(run) > 1 and all(interval is not None for _, interval in ends):
            upper = [f"{frame.x(x):.1f},{frame.y(i[1]):.1f}" for x, i in ends if i]
            lower = [f"{frame.x(x):.1f},{frame.y(i[0]):.1f}" for x, i in reversed(ends) if i]
            parts.append(f'<polygon class="band" points="{" ".join(upper + lower)}"{paint}/>')
        places = " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for _, x, y in run)
        parts.append(f'<polyline class="{_line_class(series)}" points="{places}"{paint}/>')
    found = list(series.points())
    if len(found) <= FEW:
        lone = {run[0][0] for run in _unbroken(series) if len(run) == 1}
        for n, x, y in found:
            parts.append(_whisker(figure, series, number, n, frame) if n in lone else "")
            parts.append(_marker(series, number, frame.x(x), frame.y(y), _tip(figure, series, n)))
    return "".join(parts)


def _dots(figure: Figure, series: Series, number: int, frame: Frame) -> str:
    few = len(series.x) <= 400
    return "".join(
        _whisker(figure, series, number, n, frame)
        + _marker(series, number, frame.x(x), frame.y(y), _tip(figure, series, n) if few else "")
        for n, x, y in series.points()
    )


def _rule(figure: Figure, series: Series, number: int, frame: Frame) -> str:
    at = frame.y(next((y for _, _, y in series.points()), frame.y.low))
    tip = f"<title>{escape(f'{series.name}: {label(series.y[0] or 0.0, percent=figure.y.percent)}')}</title>"
    ends = f'x1="{frame.x.start:.1f}" x2="{frame.x.end:.1f}" y1="{at:.1f}" y2="{at:.1f}"'
    return f'<line class="line rule" {ends}{_paint(series, number)}>{tip}</line>'


def _arrows(figure: Figure, series: Series, number: int, frame: Frame) -> str:
    paint, parts = _paint(series, number), []
    for n, x, y in series.points():
        to_x, to_y = frame.x(series.x_to[n] or 0.0), frame.y(series.y_to[n] or 0.0)
        line = f'x1="{frame.x(x):.1f}" y1="{frame.y(y):.1f}" x2="{to_x:.1f}" y2="{to_y:.1f}"'
        parts.append(
            f'<line class="arrow" {line}{paint}/><circle class="tip" cx="{to_x:.1f}" cy="{to_y:.1f}" r="1.4"{paint}/>'
        )
    return "".join(parts)


def _bars(figure: Figure, series: Series, number: int, frame: Frame, base: dict[float, float]) -> str:
    """Bars on top of those before them; `base` holds the heights so far."""
    wide = abs(frame.x.end - frame.x.start) / max(1.0, frame.x.high - frame.x.low) * spacing(figure)
    wide, parts = max(1.0, min(46.0, wide * 0.72)), []
    for n, x, y in series.points():
        foot = base.get(x, 0.0)
        base[x] = foot + y
        top, low = frame.y(foot + y), frame.y(foot)
        parts.append(
            f'<rect class="bar" x="{frame.x(x) - wide / 2:.1f}" y="{top:.1f}" width="{wide:.1f}" '
            f'height="{max(0.0, low - top):.1f}"{_paint(series, number)}>'
            f"<title>{_tip(figure, series, n)}</title></rect>"
        )
    return f"<g>{''.join(parts)}</g>"


def _cells(figure: Figure, heat: Heat, frame: Frame) -> str:
    """The map; a number stands in each cell where there is room."""
    known = [v for row in heat.values for v in row if v is not None]
    low, high = min(known, default=0.0), max(known, default=1.0)
    wide = (frame.x.end - frame.x.start) / max(1, len(figure.x.categories))
    parts = []
    for i, row in enumerate(heat.values):
        for j, value in enumerate(row):
            if value is None:
                continue
            share = (value - low) / (high - low) if high > low else 0.5
            text = label(value, percent=heat.percent)
            x, y = frame.x(j) - wide / 2, frame.y(i) - ROW / 2
            tip = escape(f"{figure.y.categories[i]}, {figure.x.categories[j]}: {text} ({heat.label})")
            parts.append(
                f'<rect class="cell" style="--p:{share * 100:.0f}%" x="{x:.1f}" y="{y:.1f}" width="{wide:.1f}" '
                f'height="{ROW:g}"><title>{tip}</title></rect>'
            )
            if _width(text) + 4 < wide:
                style = "on" if share > 0.45 else "off"
                parts.append(_text(frame.x(j), frame.y(i) + 4, text, f"value middle {style}"))
    return "".join(parts)


def _marker(series: Series, number: int, x: float, y: float, tip: str) -> str:
    """A disc, square, diamond or triangle by the series' number; open for rings."""
    kind = "ring" if series.mark == "rings" else "dot"
    inside = f"<title>{tip}</title>" if tip else ""
    paint, shape = _paint(series, number), number % 4
    if shape == 0 or kind == "ring":
        return f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="3"{paint}>{inside}</circle>'
    corners = {
        1: ((-2.7, -2.7), (2.7, -2.7), (2.7, 2.7), (-2.7, 2.7)),
        2: ((0, -3.8), (3.8, 0), (0, 3.8), (-3.8, 0)),
        3: ((0, -3.6), (3.5, 2.7), (-3.5, 2.7)),
    }[shape]
    places = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in corners)
    return f'<polygon class="{kind}" points="{places}"{paint}>{inside}</polygon>'


def _whisker(figure: Figure, series: Series, number: int, n: int, frame: Frame) -> str:
    """The interval of one mark: along x where the rows have names."""
    interval = series.interval(n)
    if interval is None:
        return ""
    if figure.y.categories:
        at = frame.y(series.y[n] or 0.0)
        ends = f'x1="{frame.x(interval[0]):.1f}" x2="{frame.x(interval[1]):.1f}" y1="{at:.1f}" y2="{at:.1f}"'
    else:
        at = frame.x(series.x[n] or 0.0)
        ends = f'x1="{at:.1f}" x2="{at:.1f}" y1="{frame.y(interval[0]):.1f}" y2="{frame.y(interval[1]):.1f}"'
    return f'<line class="whisker" {ends}{_paint(series, number)}/>'


def _tip(figure: Figure, series: Series, n: int) -> str:
    """What a mark says, escaped."""
    x, y = series.x[n] or 0.0, series.y[n] or 0.0
    across = figure.x.categories[round(x)] if figure.x.categories else label(x, percent=figure.x.percent)
    up = figure.y.categories[round(y)] if figure.y.categories else label(y, percent=figure.y.percent)
    text = f"{series.name}: {up} at {across}" if not figure.y.categories else f"{series.name}, {up}: {across}"
    if (interval := series.interval(n)) is not None:
        percent = figure.x.percent if figure.y.categories else figure.y.percent
        text += f" (95 %: {label(interval[0], percent=percent)} to {label(interval[1], percent=percent)})"
    return escape(text)


def _unbroken(series: Series) -> list[list[tuple[int, float, float]]]:
    """Runs of points without a gap."""
    runs: list[list[tuple[int, float, float]]] = []
    for point in series.points():
        if runs and runs[-1][-1][0] == point[0] - 1:
            runs[-1].append(point)
        else:
            runs.append([point])
    return runs


def _paint(series: Series, number: int) -> str:
    """Class or mix of the colour, and the dash of a line."""
    dash = (
        f' stroke-dasharray="{DASHES[number % len(DASHES)]}"' if series.mark == "line" and number % 6 else ""
    )
    if isinstance(series.colour, float):
        return (
            f' style="--c:color-mix(in srgb, var(--ramp-1) {series.colour * 100:.0f}%, var(--ramp-0))"{dash}'
        )
    return f' style="--c:var(--s{series.colour % 6})"{dash}'


def _line_class(series: Series) -> str:
    return "line rule" if series.mark == "rule" else "line"


def _text(x: float, y: float, text: str, kind: str) -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>'


def _lines(name: str) -> list[str]:
    """A name on at most two lines."""
    if len(name) <= NAME_LETTERS:
        return [name]
    cut = name.rfind(" ", 0, NAME_LETTERS + 1)
    cut = cut if cut > 6 else NAME_LETTERS
    second = name[cut:].strip()
    return [name[:cut], second if len(second) <= NAME_LETTERS else second[: NAME_LETTERS - 1] + "…"]


def _width(text: str) -> float:
    """Room that a text takes at most, px."""
    return sum(WIDE if c in WIDE_LETTERS else NARROW if c in NARROW_LETTERS else LETTER for c in text)


MARKS: dict[str, Callable[[Figure, Series, int, Frame], str]] = {
    "line": _line,
    "dots": _dots,
    "rings": _dots,
    "rule": _rule,
    "arrows": _arrows,
}
