"""Entropies and ratios against values computed by hand."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nmke.errors import NumericsError
from nmke.masking.entropy import GENERAL, SPECIFIC, RatioRange, general_entropy, specific_entropy

M = 8


def scores(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def entropy(shares: list[float]) -> float:
    return -sum(p * math.log(p) for p in shares if p > 0) / math.log(len(shares))


def test_equal_scores_have_entropy_one():
    assert general_entropy(torch.full((3, M), 0.7)) == pytest.approx(1, abs=1e-12)
    assert specific_entropy(torch.full((3, M), 0.7)) == pytest.approx(1, abs=1e-12)


def test_one_outstanding_neuron_has_entropy_zero():
    row = [0.0] * (M - 1) + [5.0]
    assert general_entropy(scores(row)) == pytest.approx(0, abs=1e-12)
    assert specific_entropy(scores(row)) == 0


@pytest.mark.parametrize("value", [0.0, -0.3])
def test_specific_entropy_is_zero_where_no_score_is_positive(value):
    assert specific_entropy(torch.full((2, M), value)) == 0


def test_general_entropy_by_hand():
    # softmax(30 * [0, ln(2)/30, ln(5)/30]) = [1, 2, 5] / 8
    first = [0.0, math.log(2) / 30, math.log(5) / 30]
    second = [0.1, 0.1, 0.1]
    expected = (entropy([1 / 8, 2 / 8, 5 / 8]) + 1) / 2
    assert general_entropy(scores(first, second)) == pytest.approx(expected, abs=1e-12)


def test_temperature_multiplies_the_scores():
    row = [0.0, math.log(3), math.log(4)]
    assert general_entropy(scores(row), temperature=1.0) == pytest.approx(entropy([1 / 8, 3 / 8, 4 / 8]))
    assert general_entropy(scores(row), temperature=2.0) == pytest.approx(entropy([1 / 26, 9 / 26, 16 / 26]))


def test_specific_entropy_by_hand():
    # best over prompts, negatives cut at zero: [1, 0, 4, 3]
    rows = scores([1.0, -2.0, 0.5, 3.0], [-1.0, -0.5, 4.0, 2.0])
    assert specific_entropy(rows) == pytest.approx(entropy([1 / 8, 0, 4 / 8, 3 / 8]), abs=1e-12)


@pytest.mark.parametrize(
    "table, variant, half, low, high",
    [
        (GENERAL, "paper", 0.35, 0.3, 0.4),
        (GENERAL, "released", 0.3125, 0.3, 0.4),
        (SPECIFIC, "paper", 0.25, 0.2, 0.3),
        (SPECIFIC, "released", 0.325, 0.3, 0.4),
    ],
)
def test_ratios_of_paper_and_released_code(table, variant, half, low, high):
    assert table[variant].ratio(0.0) == pytest.approx(low)
    assert table[variant].ratio(0.5) == pytest.approx(half)
    assert table[variant].ratio(1.0) == pytest.approx(high)


@given(st.lists(st.lists(st.floats(-50, 50), min_size=M, max_size=M), min_size=1, max_size=4))
def test_entropies_stay_between_zero_and_one_and_do_not_depend_on_order(rows: list[list[float]]):
    table = scores(*rows)
    for measure in (general_entropy, specific_entropy):
        found = measure(table)
        assert 0 <= found <= 1
        assert measure(table.flip(1)) == pytest.approx(found, abs=1e-9)
        assert measure(table.flip(0)) == pytest.approx(found, abs=1e-9)
        assert 0.2 <= RatioRange(0.2, 0.1, 2.0).ratio(found) <= 0.3 + 1e-12


@pytest.mark.parametrize("shift", [-3.0, 2.0])
def test_general_entropy_sees_differences_only(shift):
    table = torch.randn(4, M, generator=torch.Generator().manual_seed(0)).double()
    assert general_entropy(table + shift) == pytest.approx(general_entropy(table), abs=1e-12)


def test_a_layer_of_one_neuron_has_entropy_zero():
    assert general_entropy(torch.ones(2, 1)) == 0
    assert specific_entropy(torch.ones(2, 1)) == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("measure", [general_entropy, specific_entropy])
def test_scores_that_are_not_finite_are_refused(measure, bad):
    table = torch.zeros(2, M)
    table[1, 3] = bad
    with pytest.raises(
        NumericsError, match=r"1 of 16 attribution scores are not finite; load the model in float32"
    ):
        measure(table)
