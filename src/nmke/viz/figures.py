"""What a chart says, apart from how it is drawn: one description for SVG, PNG, CSV and JSON."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

Mark = Literal["line", "dots", "rings", "bars", "rule", "arrows"]
Value = float | None
PALEST_LINE = 0.4  # on the ordered scale


@dataclass(frozen=True)
class Axis:
    """One axis.

    Args:
        label: What it shows and in which unit.
        categories: Names at 0, 1, 2 …; a numeric axis without.
        low, high: Fixed ends; None takes them from the data.
        log: Logarithmic.
        percent: Values are shares, shown as per cent.
        whole: Values are counts: no tick between two integers.
    """

    label: str
    categories: tuple[str, ...] = ()
    low: Value = None
    high: Value = None
    log: bool = False
    percent: bool = False
    whole: bool = False


def share(label: str) -> Axis:
    """An axis of shares from 0 to 100 %."""
    return Axis(label, low=0.0, high=1.0, percent=True)


@dataclass(frozen=True)
class Series:
    """One set of marks; `None` or a number that is not finite is a gap.

    Args:
        name: In the legend.
        x, y: Places; a rule is one y, drawn right across.
        low, high: Ends of the 95 % interval of each y (of x, where the y axis has categories).
        mark: How it is drawn; bars of one place are stacked.
        x_to, y_to: Where arrows end.
        colour: Number of a distinct colour, or a float in [0, 1] on the ordered scale.
    """

    name: str
    x: tuple[Value, ...]
    y: tuple[Value, ...]
    low: tuple[Value, ...] = ()
    high: tuple[Value, ...] = ()
    mark: Mark = "line"
    x_to: tuple[Value, ...] = ()
    y_to: tuple[Value, ...] = ()
    colour: int | float = 0

    def points(self) -> Iterator[tuple[int, float, float]]:
        """Number and place of every mark that exists."""
        for number, (x, y) in enumerate(zip(self.x, self.y, strict=True)):
            if is_number(x) and is_number(y):
                yield number, float(x or 0.0), float(y or 0.0)

    def interval(self, number: int) -> tuple[float, float] | None:
        """The interval of one mark."""
        if not self.low or not (is_number(self.low[number]) and is_number(self.high[number])):
            return None
        return float(self.low[number] or 0.0), float(self.high[number] or 0.0)


@dataclass(frozen=True)
class Heat:
    """Cells of a map.

    Args:
        values: Row by row; `None` is an empty cell.
        label: What a value is.
        percent: Values are shares, shown as per cent.
    """

    values: tuple[tuple[Value, ...], ...]
    label: str
    percent: bool = False


@dataclass(frozen=True)
class Figure:
    """One chart.

    Args:
        id: Name of the chart, and of its files.
        title: What it shows, in plain words.
        caption: How to read it, with n and where the numbers come from.
        x, y: Axes; both have categories where there is `heat`.
        series: What is drawn.
        heat: Cells instead of series.
    """

    id: str
    title: str
    caption: str
    x: Axis
    y: Axis
    series: tuple[Series, ...] = ()
    heat: Heat | None = None

    def as_json(self) -> dict[str, Any]:
        """Everything, numbers that are not finite as null."""
        return dict(plain(asdict(self)))

    def rows(self) -> list[dict[str, Any]]:
        """One row per mark or cell."""
        if self.heat is not None:
            return [
                {"x": self.x.categories[j], "y": self.y.categories[i], "value": value}
                for i, line in enumerate(self.heat.values)
                for j, value in enumerate(line)
            ]
        return [self._row(series, number) for series in self.series for number in range(len(series.x))]

    def _row(self, series: Series, number: int) -> dict[str, Any]:
        row: dict[str, Any] = {
            "series": series.name,
            "x": _named(self.x, series.x[number]),
            "y": _named(self.y, series.y[number]),
        }
        if series.low:
            row |= {"low": series.low[number], "high": series.high[number]}
        if series.x_to:
            row |= {"x_to": series.x_to[number], "y_to": series.y_to[number]}
        return row


def is_number(value: Value) -> bool:
    """Whether there is something to draw."""
    return value is not None and math.isfinite(value)


def plain(value: Any) -> Any:
    """The value for JSON, numbers that are not finite as null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def ordered(number: int, count: int) -> float:
    """Colour of the `number`-th of `count` things that have an order; none too pale for a line."""
    return PALEST_LINE + (1 - PALEST_LINE) * (number / (count - 1) if count > 1 else 0.5)


def wilson(successes: float, n: int) -> tuple[float, float]:
    """95 % Wilson interval of a share.

    For means of values in [0, 1] instead of hits and misses it is on the wide side.

    Args:
        successes: How many, or the sum of the values.
        n: Of how many, at least 1.
    """
    z = 1.959964
    share = successes / n
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, middle - half), min(1.0, middle + half)


def _named(axis: Axis, value: Value) -> Any:
    return axis.categories[round(value)] if axis.categories and value is not None else value


def numbers(values: Sequence[float | int | None]) -> tuple[Value, ...]:
    """The values as a series takes them."""
    return tuple(None if value is None else float(value) for value in values)
