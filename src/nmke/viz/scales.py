"""From data to places on a chart: limits, round ticks, and numbers in few characters."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

from nmke.viz.figures import Axis, Figure, is_number

TICKS = 5


@dataclass(frozen=True)
class Scale:
    """One axis laid over a range of pixels.

    Args:
        axis: What it shows.
        low, high: Ends of the data, `low` < `high`.
        start, end: Where they are drawn.
    """

    axis: Axis
    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """The place of a value, kept inside the axis."""
        low, high, at = (
            (map(math.log10, (self.low, self.high, max(value, self.low))))
            if self.axis.log
            else (
                self.low,
                self.high,
                value,
            )
        )
        share = min(1.0, max(0.0, (at - low) / (high - low)))
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[tuple[float, str]]:
        """Places in data units, with their labels."""
        if self.axis.categories:
            return [(float(i), name) for i, name in enumerate(self.axis.categories)]
        if self.axis.log:
            return _log_ticks(self.low, self.high)
        found = _round_ticks(self.low, self.high, TICKS, whole=self.axis.whole)
        step = found[1] - found[0] if len(found) > 1 else 1.0
        return [(value, label(value, step, percent=self.axis.percent)) for value in found]


def limits(figure: Figure, which: str) -> tuple[float, float]:
    """Ends of the x or y axis: fixed ones, else those of everything drawn, bars from 0.

    Args:
        figure: The chart.
        which: "x" or "y".
    """
    axis: Axis = getattr(figure, which)
    if axis.categories:
        return -0.5, len(axis.categories) - 0.5
    values = _drawn(figure, which)
    if axis.log:
        values = [value for value in values if value > 0]
    low = axis.low if axis.low is not None else min(values, default=0.0)
    high = axis.high if axis.high is not None else max(values, default=1.0)
    if axis.log:
        return (low, high) if low < high else (low / 3, low * 3)
    if low == high:
        return _around(low, whole=axis.whole)
    pad = max((high - low) * 0.04, spacing(figure) * 0.4 if which == "x" and _has_bars(figure) else 0.0)
    keep_low = axis.low is not None or (low == 0 and which == "y")
    return low if keep_low else low - pad, high if axis.high is not None else high + pad


def label(value: float, step: float = 0.0, *, percent: bool = False) -> str:
    """A number in few characters; with a step, as many digits as tell two ticks apart."""
    return _written(value, step, percent=percent).replace("-", "−")


def counted(count: int, noun: str, plural: str = "") -> str:
    """The count with its noun: "1 fact", "2 facts", "2 batches"."""
    return f"{count} {noun if count == 1 else plural or f'{noun}s'}"


def _written(value: float, step: float, *, percent: bool) -> str:
    if percent:
        value, step = value * 100, step * 100
    if value == 0:
        return "0 %" if percent else "0"
    if not percent and (abs(value) >= 100_000 or abs(value) < 0.0005):
        return f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e").replace("e+", "e").replace(".0e", "e")
    digits = _step_digits(step) if step > 0 else _digits(value)
    text = f"{value:,.{digits}f}".replace(",", "\u202f")
    return f"{text} %" if percent else text


def _step_digits(step: float) -> int:
    """Enough for every multiple of the step: one for 0.5, two for 0.25."""
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    return digits if abs(step * 10**digits - round(step * 10**digits)) < 1e-6 else digits + 1


def _digits(value: float) -> int:
    """Enough for three significant digits; none for a whole number."""
    return (
        0 if abs(value - round(value)) < 1e-9 * abs(value) else max(0, 2 - math.floor(math.log10(abs(value))))
    )


def spacing(figure: Figure) -> float:
    """Smallest distance between two bars, in units of x; 1 for a single one."""
    places = sorted({x for series in figure.series if series.mark == "bars" for _, x, _ in series.points()})
    return min((b - a for a, b in itertools.pairwise(places)), default=1.0)


def _has_bars(figure: Figure) -> bool:
    return any(series.mark == "bars" for series in figure.series)


def _around(value: float, *, whole: bool) -> tuple[float, float]:
    half = 1.0 if whole else abs(value) * 0.1 or 1.0
    return value - half, value + half


def _drawn(figure: Figure, which: str) -> list[float]:
    intervals_on = "x" if figure.y.categories else "y"
    found: list[float] = []
    for series in figure.series:
        if series.mark == "rule" and which == "x":
            continue
        found += [v for v in getattr(series, which) if v is not None and is_number(v)]
        found += [v for v in getattr(series, f"{which}_to") if v is not None and is_number(v)]
        if which == intervals_on:
            found += [v for v in (*series.low, *series.high) if v is not None and is_number(v)]
    if which == "y" and _has_bars(figure):
        found += [0.0, *_stacked(figure)]
    return found


def _stacked(figure: Figure) -> list[float]:
    """Heights of the stacks."""
    total: dict[float, float] = {}
    for series in figure.series:
        if series.mark == "bars":
            for _, x, y in series.points():
                total[x] = total.get(x, 0.0) + y
    return list(total.values())


def _round_ticks(low: float, high: float, count: int, *, whole: bool) -> list[float]:
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw * 0.999)
    step = max(1.0, float(math.ceil(step))) if whole else step
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[tuple[float, str]]:
    powers = range(math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9) + 1)
    if len(powers) >= 2:
        every = max(1, math.ceil(len(powers) / 6))
        return [(10.0**p, label(10.0**p, 10.0**p)) for p in powers if p % every == 0]
    spots = [
        m * 10.0**p
        for p in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for m in (1, 2, 5)
    ]
    found = [value for value in spots if low <= value <= high]
    return [(value, label(value, value)) for value in found] or [(low, label(low)), (high, label(high))]
