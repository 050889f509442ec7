"""Ticks, limits and numbers in few characters."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nmke.viz.figures import Axis, Figure, Series, wilson
from nmke.viz.scales import Scale, counted, label, limits


def scale(low: float, high: float, **axis: object) -> Scale:
    return Scale(Axis("x", **axis), low, high, 0.0, 100.0)


def figure(*series: Series, **axis: object) -> Figure:
    return Figure("f", "F", "", Axis("x"), Axis("y", **axis), series)


@given(st.floats(-1e4, 1e4), st.floats(1e-3, 1e4))
def test_ticks_are_inside_evenly_spaced_and_told_apart(low: float, width: float) -> None:
    ticks = scale(low, low + width).ticks()
    values = [value for value, _ in ticks]
    assert 2 <= len(ticks) <= 7
    assert all(low - width * 1e-6 <= value <= low + width * (1 + 1e-6) for value in values)
    steps = [b - a for a, b in itertools.pairwise(values)]
    assert max(steps) == pytest.approx(min(steps), rel=1e-6)
    assert len({name for _, name in ticks}) == len(ticks)


@pytest.mark.parametrize(
    ("value", "step", "percent", "text"),
    [
        (0.0, 0.0, False, "0"),
        (0.0, 0.2, True, "0 %"),
        (0.2, 0.2, True, "20 %"),
        (0.025, 0.025, True, "2.5 %"),
        (1.025, 0.025, False, "1.025"),
        (1234.0, 0.0, False, "1\u202f234"),
        (123456.0, 0.0, False, "1.2e5"),
        (0.0001, 0.0, False, "1e−4"),
        (-0.5, 0.25, False, "−0.50"),
        (0.12345, 0.0, False, "0.123"),
        (5.0, 1.0, False, "5"),
    ],
)
def test_numbers_in_few_characters(value: float, step: float, percent: bool, text: str) -> None:
    assert label(value, step, percent=percent) == text


def test_counts_with_their_nouns() -> None:
    assert [counted(n, "fact") for n in (0, 1, 2)] == ["0 facts", "1 fact", "2 facts"]


def test_whole_axes_have_no_tick_between_integers() -> None:
    assert [name for _, name in scale(0.6, 2.4, whole=True).ticks()] == ["1", "2"]
    assert all(value == int(value) for value, _ in scale(0, 7, whole=True).ticks())


def test_logarithmic_axes() -> None:
    log = scale(1.0, 1000.0, log=True)
    assert log(1.0) == 0.0 and log(1000.0) == 100.0 and log(10.0) == pytest.approx(100 / 3)
    assert [name for _, name in log.ticks()] == ["1", "10", "100", "1\u202f000"]
    assert [value for value, _ in scale(1.0, 4.0, log=True).ticks()] == [1.0, 2.0]
    assert [name for _, name in scale(1.0, 4.0, log=True).ticks()] == ["1", "2"]
    assert [name for _, name in scale(0.4, 2.5, log=True).ticks()] == ["0.5", "1", "2"]
    assert log(0.0) == 0.0  # what is not positive stays at the lower end


def test_limits_hold_everything_that_is_drawn() -> None:
    shown = figure(
        Series("a", (1.0, 3.0), (0.2, 0.4), (0.1, 0.3), (0.3, 0.9)), Series("r", (0.0,), (2.0,), mark="rule")
    )
    low, high = limits(shown, "y")
    assert low < 0.1 and high > 2.0
    assert limits(shown, "x")[0] > 0.5, "a rule has no place along x"


def test_bars_stand_on_zero_and_stack() -> None:
    shown = figure(*(Series(n, (1.0, 2.0), (3.0, 4.0), mark="bars") for n in "ab"), low=0.0)
    assert limits(shown, "y") == (0.0, pytest.approx(8.32))
    low, high = limits(shown, "x")
    assert low <= 0.6 and high >= 2.4, "whole bars fit"


def test_one_value_gets_room_around_it() -> None:
    low, high = limits(figure(Series("a", (5.0,), (2.0,))), "y")
    assert low < 2.0 < high
    assert limits(figure(), "y")[0] < limits(figure(), "y")[1]


def test_gaps_are_not_drawn() -> None:
    shown = figure(Series("a", (1.0, 2.0, 3.0), (1.0, None, float("nan"))))
    assert limits(shown, "y")[1] < 2.0


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"), [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (5, 10, 0.2366, 0.7634)]
)
def test_wilson_intervals_agree_with_published_values(hits: int, n: int, low: float, high: float) -> None:
    assert wilson(hits, n) == (pytest.approx(low, abs=1e-3), pytest.approx(high, abs=1e-3))
