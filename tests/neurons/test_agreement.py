"""Rank correlation against counting by hand."""

import pytest
import torch

from nmke.neurons.agreement import ranks, spearman, top_recall


def literal_ranks(values: list[float]) -> list[float]:
    return [sum(v < x for v in values) + (sum(v == x for v in values) - 1) / 2 for x in values]


def test_equal_values_share_their_mean_rank():
    values = torch.tensor([[3.0, 1.0, 3.0, 2.0, 3.0], [0.0, 0.0, -1.0, 5.0, 0.0]])
    assert ranks(values).tolist() == [literal_ranks(row) for row in values.tolist()]


def test_spearman_equals_the_correlation_of_literal_ranks():
    generator = torch.Generator().manual_seed(0)
    a = torch.randint(0, 6, (4, 30), generator=generator).float()
    b = a + torch.randint(0, 4, (4, 30), generator=generator)
    for row, found in enumerate(spearman(a, b).tolist()):
        pair = torch.tensor([literal_ranks(a[row].tolist()), literal_ranks(b[row].tolist())])
        assert found == pytest.approx(float(torch.corrcoef(pair)[0, 1]), abs=1e-6)


def test_spearman_of_monotone_reversed_and_constant_rows():
    a = torch.arange(10.0)[None]
    assert float(spearman(a, a.exp())) == pytest.approx(1.0)
    assert float(spearman(a, -(a**3))) == pytest.approx(-1.0)
    assert float(spearman(a, torch.ones_like(a))) == 0.0


def test_top_recall_counts_what_is_found():
    truth = torch.tensor([[9.0, 8.0, 7.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]])
    guess = torch.tensor([[1.0, 0.0, 9.0, 8.0, 0.5, 0.0, 0.0, 0.0, 0.0, 0.0]])
    assert float(top_recall(guess, truth, 0.3)) == pytest.approx(2 / 3)
    assert float(top_recall(truth, truth, 0.3)) == 1.0
