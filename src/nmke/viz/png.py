"""Figures as PNG files, by matplotlib, on a white ground. Needs the extra `report`."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

from nmke.errors import ConfigError
from nmke.viz.figures import Figure, Heat, Series
from nmke.viz.palette import RAMP_LIGHT, chosen
from nmke.viz.scales import Scale, label, limits, spacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SIZE, DOTS_PER_INCH = (6.4, 4.2), 160
MOST_TICKS = 12  # along x
MARKERS = ("o", "s", "D", "^")
LINES: tuple[Any, ...] = ("-", (0, (6, 3)), (0, (2, 2)), (0, (8, 3, 2, 3)), (0, (1, 3)), (0, (10, 4)))


def draw_png(figure: Figure) -> bytes:
    """The chart as a PNG file.

    Raises:
        ConfigError: If matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure as Canvas
    except ImportError as error:
        raise ConfigError(
            "--format png needs matplotlib, which is not installed; pip install 'nmke[report]', "
            "or take the charts from the HTML file"
        ) from error
    canvas = Canvas(figsize=SIZE, dpi=DOTS_PER_INCH, layout="constrained")
    FigureCanvasAgg(canvas)
    axes = canvas.subplots()
    if figure.heat is not None:
        _heat(axes, figure.heat)
    else:
        _series(axes, figure)
    _axes(axes, figure)
    axes.set_title(figure.title, loc="left", fontsize=11)
    if len(figure.series) > 1:
        canvas.legend(loc="outside lower left", ncols=3, fontsize=8, frameon=False)
    content = io.BytesIO()
    canvas.savefig(content, format="png")
    return content.getvalue()


def _series(axes: Axes, figure: Figure) -> None:
    foot: dict[float, float] = {}
    for number, series in enumerate(figure.series):
        _one(axes, figure, series, number, foot)


def _one(axes: Axes, figure: Figure, series: Series, number: int, foot: dict[float, float]) -> None:
    colour, points = chosen(series.colour), list(series.points())
    x, y = [p[1] for p in points], [p[2] for p in points]
    ends = [
        series.interval(p[0]) or (v, v) for p, v in zip(points, x if figure.y.categories else y, strict=True)
    ]
    if series.mark == "bars":
        axes.bar(
            x,
            y,
            bottom=[foot.get(place, 0.0) for place in x],
            width=0.72 * spacing(figure),
            color=colour,
            label=series.name,
        )
        for place, value in zip(x, y, strict=True):
            foot[place] = foot.get(place, 0.0) + value
    elif series.mark == "rule":
        axes.axhline(y[0], color=colour, linestyle="--", linewidth=1.2, label=series.name)
    elif series.mark == "arrows":
        to = [(series.x_to[n] or 0.0, series.y_to[n] or 0.0) for n, _, _ in points]
        for a, b, (c, d) in zip(x, y, to, strict=True):
            axes.plot([a, c], [b, d], color=colour, linewidth=0.7, alpha=0.6)
        axes.scatter([c for c, _ in to], [d for _, d in to], s=5, color=colour, label=series.name)
    elif series.mark == "line":
        marker = MARKERS[number % 4] if len(points) <= 40 else None
        axes.plot(
            x, y, color=colour, linestyle=LINES[number % 6], marker=marker, markersize=4, label=series.name
        )
        if series.low:
            axes.fill_between(
                x, [e[0] for e in ends], [e[1] for e in ends], color=colour, alpha=0.18, linewidth=0
            )
    else:
        face = "none" if series.mark == "rings" else colour
        axes.scatter(
            x,
            y,
            s=22,
            marker=MARKERS[number % 4],
            facecolors=face,
            edgecolors=colour,
            label=series.name,
            zorder=3,
        )
        if series.low and figure.y.categories:
            axes.hlines(y, [e[0] for e in ends], [e[1] for e in ends], color=colour)
        elif series.low:
            axes.vlines(x, [e[0] for e in ends], [e[1] for e in ends], color=colour)


def _heat(axes: Axes, heat: Heat) -> None:
    from matplotlib.colors import LinearSegmentedColormap

    rows = [[float("nan") if value is None else value for value in row] for row in heat.values]
    ramp = LinearSegmentedColormap.from_list("ordered", list(RAMP_LIGHT))
    image = axes.imshow(rows, aspect="auto", cmap=ramp)
    low, high = image.get_clim()
    for i, row in enumerate(rows):
        for j, value in enumerate(row):
            if value == value and len(row) <= MOST_TICKS:
                ink = "white" if high > low and (value - low) / (high - low) > 0.45 else "black"
                text = label(value, percent=heat.percent)
                axes.text(j, i, text, ha="center", va="center", fontsize=7, color=ink)


def _axes(axes: Axes, figure: Figure) -> None:
    """Labels, and the ticks that the SVG has."""
    from matplotlib.ticker import NullLocator

    axes.set_xlabel(figure.x.label)
    axes.set_ylabel(figure.y.label)
    axes.spines[["top", "right"]].set_visible(False)
    for side, axis, drawn in (("x", figure.x, axes.xaxis), ("y", figure.y, axes.yaxis)):
        low, high = limits(figure, side)
        if axis.log:
            (axes.set_xscale if side == "x" else axes.set_yscale)("log")
            drawn.set_minor_locator(NullLocator())
        ticks = Scale(axis, low, high, 0.0, 1.0).ticks()
        ticks = ticks[:: -(-len(ticks) // MOST_TICKS)] if side == "x" and ticks else ticks
        drawn.set_ticks([place for place, _ in ticks], [name for _, name in ticks])
        ends = (high, low) if side == "y" and axis.categories else (low, high)
        (axes.set_xlim if side == "x" else axes.set_ylim)(*ends)
    if figure.heat is None:
        axes.grid(axis="x" if figure.y.categories else "y", color="#e6e9ee")
        axes.set_axisbelow(True)
