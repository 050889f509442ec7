"""Pure metrics against hand-computed values and closed forms."""

import math
import statistics
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nmke.errors import NumericsError
from nmke.evaluation.metrics import (
    RESAMPLES,
    contains_answer,
    cut_answer,
    exact_match,
    exp_mean_interval,
    harmonic_interval,
    harmonic_mean,
    mean_interval,
    normalise_answer,
    paired_difference,
    token_accuracy,
)
from nmke.evaluation.text_metrics import consistency, fluency, ngram_entropy

NUMBERS = [math.sin(37.0 * index) for index in range(30)]
ROWS = [[1.0, None], [0.5, 0.25], [0.75, None], [0.9, None], [0.1, 0.5], [1.0, None], [0.2, 1.0]]
SUMS, COUNTS = [20.0, 31.5, 4.25, 60.0, 8.0, 1.5, 42.0], [9, 12, 3, 20, 5, 1, 10]


def test_token_accuracy_is_the_share_of_hits() -> None:
    assert token_accuracy([1, 2, 3, 4], [1, 0, 3, 0]) == 0.5
    with pytest.raises(ValueError, match="lengths must agree"):
        token_accuracy([1], [1, 2])
    with pytest.raises(ValueError, match="not 0"):
        token_accuracy([], [])


def test_interval_is_deterministic_and_holds_the_mean() -> None:
    values = [float(index % 3 == 0) for index in range(60)]
    first = mean_interval(values, seed=3)
    assert first == mean_interval(values, seed=3)
    assert first != mean_interval(values, seed=4)
    assert first.n == 60
    assert first.low < first.mean < first.high


def test_interval_is_near_the_normal_one() -> None:
    values = [math.sin(37.0 * index) for index in range(400)]
    estimate = mean_interval(values)
    half = 1.96 * statistics.stdev(values) / math.sqrt(len(values))
    assert estimate.low == pytest.approx(estimate.mean - half, abs=0.1 * half)
    assert estimate.high == pytest.approx(estimate.mean + half, abs=0.1 * half)


def test_interval_in_several_blocks_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    from nmke.evaluation import metrics

    whole = metrics.mean_interval(NUMBERS), metrics.harmonic_interval(ROWS)
    monkeypatch.setattr(metrics, "_BLOCK", 100)
    assert [len(block) for block in metrics._resampled(30, 0, 8)] == [3, 3, 2]
    assert (metrics.mean_interval(NUMBERS), metrics.harmonic_interval(ROWS)) == whole


def test_intervals_are_those_of_samples_drawn_one_by_one() -> None:
    def interval(statistic: Callable[[list[int]], float]) -> list[float]:
        generator = np.random.default_rng(3)
        drawn = [statistic(generator.integers(0, 7, size=7).tolist()) for _ in range(RESAMPLES)]
        found = [value for value in drawn if not math.isnan(value)]
        assert len(found) < RESAMPLES or statistic is not harmonic
        return np.percentile(found, [2.5, 97.5]).tolist()

    def harmonic(places: list[int]) -> float:
        columns = [[row[i] for row in map(ROWS.__getitem__, places)] for i in range(2)]
        given = [[value for value in column if value is not None] for column in columns]
        return harmonic_mean([statistics.fmean(c) for c in given]) if all(given) else math.nan

    def loss(places: list[int]) -> float:
        return sum(SUMS[i] for i in places) / sum(COUNTS[i] for i in places)

    estimate = harmonic_interval(ROWS, seed=3)
    assert [estimate.low, estimate.high] == pytest.approx(interval(harmonic), rel=1e-12)
    estimate = exp_mean_interval(SUMS, COUNTS, seed=3)
    assert [estimate.low, estimate.high] == pytest.approx([math.exp(end) for end in interval(loss)])


def test_interval_of_one_value_and_of_none() -> None:
    one = mean_interval([0.25])
    assert (one.mean, one.low, one.high, one.n) == (0.25, 0.25, 0.25, 1)
    with pytest.raises(ValueError, match="mean of no value"):
        mean_interval([])
    with pytest.raises(NumericsError, match="1 of 2 scores are not finite"):
        mean_interval([1.0, float("nan")])


def test_paired_difference_is_narrower_than_unpaired() -> None:
    before = [float(index % 2) for index in range(40)]
    after = [value + 0.1 for value in before]
    difference = paired_difference(after, before)
    assert difference.low == pytest.approx(0.1)
    assert difference.high == pytest.approx(0.1)
    with pytest.raises(ValueError, match="same requests in both"):
        paired_difference([1.0], [])


def test_harmonic_mean() -> None:
    assert harmonic_mean([0.5, 1.0]) == pytest.approx(2 / 3)
    assert harmonic_mean([0.0, 1.0]) == 0.0


def test_harmonic_interval_uses_the_columns_means() -> None:
    rows = [[1.0, 0.5, None], [0.0, 1.0, 0.5], [1.0, 0.0, 1.0]]
    estimate = harmonic_interval(rows)
    assert estimate.mean == pytest.approx(harmonic_mean([2 / 3, 0.5, 0.75]))
    assert estimate.low <= estimate.mean <= estimate.high
    assert estimate == harmonic_interval(rows)
    with pytest.raises(ValueError, match="no value in any row"):
        harmonic_interval([[1.0, None], [0.5, None]])


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The  Eiffel Tower.", "eiffel tower"),
        ("U.S.A.", "u s"),
        ("«Łódź»", "łódź"),
        ("Rock'n'Roll", "rock n roll"),
    ],
)
def test_normalise_answer(text: str, normal: str) -> None:
    assert normalise_answer(text) == normal


@pytest.mark.parametrize(
    ("text", "target", "cut"),
    [
        (" Lyon. It is", "Lyon", "Lyon"),
        ("\n\n Lyon\nParis", "Lyon", "Lyon"),
        ("3.5 million. And", "x", "3.5 million"),
        ("St. Louis. It", "St. Louis", "St. Louis"),
        ('"Lyon." he said', "Lyon", '"Lyon'),
        ("リヨン。次", "リヨン", "リヨン"),
        ("", "x", ""),
        (" \n ", "x", ""),
    ],
)
def test_cut_answer(text: str, target: str, cut: str) -> None:
    assert cut_answer(text, target) == cut


def test_matches() -> None:
    assert exact_match("the Lyon!", "Lyon")
    assert not exact_match("Lyons", "Lyon")
    assert contains_answer("in Lyon, France", "lyon")
    assert not contains_answer("the Lyonnais", "Lyon")
    assert contains_answer("これはリヨンです", "リヨン")
    assert not contains_answer("anything", "...")


def test_ngram_entropy_and_fluency() -> None:
    assert ngram_entropy(["a", "b", "a", "b"], 2) == pytest.approx(
        -(2 / 3 * math.log2(2 / 3) + 1 / 3 * math.log2(1 / 3))
    )
    assert ngram_entropy(["a"], 2) == 0.0
    text = "one two three four five"
    assert fluency(text) == pytest.approx((2 / 3 * 2 + 4 / 3 * math.log2(3)) / 2)
    assert fluency("no no no no no no") == 0.0


def test_consistency_orders_texts() -> None:
    references = ["Lyon lies on the Rhône and is known for silk", "Silk was woven in Lyon"]
    same = consistency(references, references)
    near = consistency(["Lyon was known for its silk"], references)
    far = consistency(["Quantum chromodynamics has eight gluons"], references)
    assert same == pytest.approx(1.0)
    assert same > near > far == 0.0
    assert consistency([""], references) == 0.0


@given(st.text(max_size=60), st.text(max_size=20))
def test_any_text_is_scored(text: str, target: str) -> None:
    cut = cut_answer(text, target)
    assert len(cut) <= len(text)
    assert exact_match(text, text)
    contains_answer(text, target)
    assert fluency(text) >= 0.0
