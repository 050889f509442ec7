"""Streamed second moments and null spaces against dense float64 ones."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nmke.errors import ConfigError, NumericsError, StatsError
from nmke.stats.covariance import KeyCovariance, LayerStats, null_space

M = 10


def keys(count: int, d_mlp: int = M, seed: int = 0) -> Tensor:
    return torch.randn(count, d_mlp, generator=torch.Generator().manual_seed(seed))


def moment_with(eigenvalues: list[float], seed: int = 0) -> Tensor:
    size = len(eigenvalues)
    basis, _ = torch.linalg.qr(keys(size, size, seed).double())
    return basis @ torch.diag(torch.tensor(eigenvalues, dtype=torch.float64)) @ basis.T


@given(st.lists(st.integers(1, 40), min_size=1, max_size=6))
def test_streamed_moment_equals_the_dense_one(sizes: list[int]):
    everything = keys(sum(sizes))
    running = KeyCovariance.empty(M)
    for part in everything.split(sizes):
        running.add(part)
    dense = everything.double().T @ everything.double() / sum(sizes)
    assert running.count == sum(sizes)
    assert running.total.dtype == torch.float64
    torch.testing.assert_close(running.moment, dense, rtol=1e-5, atol=1e-6)


def test_moment_of_whole_numbers_is_exact_and_not_centred():
    whole = torch.randint(-4, 5, (50, M), generator=torch.Generator().manual_seed(0)).float() + 3
    running = KeyCovariance.empty(M)
    for part in whole.split(7):
        running.add(part)
    assert torch.equal(running.moment, whole.double().T @ whole.double() / 50)


def test_half_precision_keys_are_summed_in_double():
    running = KeyCovariance.empty(M)
    part = keys(64).bfloat16()
    for _ in range(200):
        running.add(part)
    dense = part.double().T @ part.double() / 64
    torch.testing.assert_close(running.moment, dense, rtol=1e-5, atol=1e-6)


def test_sums_of_huge_layers_are_kept_in_single_precision():
    assert KeyCovariance.empty(8192, device="meta").total.dtype == torch.float64
    assert KeyCovariance.empty(8193, device="meta").total.dtype == torch.float32


def test_merged_statistics_are_those_of_both_samples():
    parts = [KeyCovariance.empty(M) for _ in range(3)]
    for running, rows in zip(
        parts, (keys(5), keys(9, seed=1), torch.cat([keys(5), keys(9, seed=1)])), strict=True
    ):
        running.add(rows)
    merged = parts[0].merge(parts[1])
    assert (merged.count, parts[0].count) == (14, 5)
    torch.testing.assert_close(merged.moment, parts[2].moment, rtol=1e-6, atol=1e-7)


def test_statistics_of_other_sizes_are_not_merged():
    with pytest.raises(StatsError, match="cannot merge key statistics of 10 and 4 neurons"):
        KeyCovariance.empty(M).merge(KeyCovariance.empty(4))


def test_empty_and_broken_statistics_have_no_moment():
    with pytest.raises(StatsError, match="hold no samples; run `nmke prepare`"):
        _ = KeyCovariance.empty(M).moment
    running = KeyCovariance.empty(M)
    running.add(torch.full((2, M), float("inf")))
    with pytest.raises(NumericsError, match="not finite; the model's activations overflow"):
        _ = running.moment


@pytest.mark.parametrize(
    "rule, value, kept",
    [
        ("threshold", 1e-2, 2),
        ("threshold", 0.5, 4),
        ("threshold", 100.0, 6),
        ("share", 0.34, 2),
        ("share", 0.5, 3),
        ("share", 0.99, 6),
        ("energy", 0.0005, 2),  # (0.001 + 0.002) / 10.103
        ("energy", 0.02, 4),
        ("energy", 0.35, 5),
    ],
)
def test_each_rule_keeps_the_directions_it_names(rule, value, kept):
    moment = moment_with([0.001, 0.002, 0.05, 0.05, 3.0, 7.0])
    projector = null_space(moment, rule, value)
    assert projector.kept == kept
    _, vectors = torch.linalg.eigh(moment)
    expected = vectors[:, :kept] @ vectors[:, :kept].T
    torch.testing.assert_close(projector.dense(), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.6, 0.9, 0.99])
def test_projector_is_one_and_keeps_only_the_smaller_basis(share):
    sample = keys(100).double()
    projector = null_space(sample.T @ sample / 100, "share", share)
    dense = projector.dense()
    torch.testing.assert_close(dense, dense.T, rtol=0, atol=1e-12)
    torch.testing.assert_close(dense @ dense, dense, rtol=0, atol=1e-12)
    assert float(dense.trace()) == pytest.approx(projector.kept)
    assert projector.kept == round(share * M)
    assert projector.basis.shape == (M, min(projector.kept, M - projector.kept))
    assert projector.complement is (projector.kept > M // 2)
    rows = keys(4, seed=3).double()
    torch.testing.assert_close(projector.project(rows), rows @ dense, rtol=1e-9, atol=1e-12)


def test_keys_that_were_never_seen_are_the_null_space():
    sample = keys(50).double()
    sample[:, :3] = 0
    projector = null_space(sample.T @ sample / 50, "threshold", 1e-9)
    assert projector.kept == 3
    torch.testing.assert_close(projector.dense(), torch.diag(torch.tensor([1.0] * 3 + [0.0] * 7)).double())


@pytest.mark.parametrize(
    "rule, value", [("threshold", 0.0), ("threshold", -1.0), ("share", 1.0), ("energy", 1.5)]
)
def test_values_out_of_range_are_refused(rule, value):
    with pytest.raises(ConfigError, match=rf"null-space {rule} {value} is out of range"):
        null_space(torch.eye(M).double(), rule, value)


@pytest.mark.parametrize("rule, value", [("threshold", 1e-9), ("share", 0.01), ("energy", 1e-9)])
def test_a_rule_that_keeps_nothing_says_what_there_is(rule, value):
    with pytest.raises(
        ConfigError,
        match=rf"null-space {rule} {value} keeps none of 10 directions \(smallest eigenvalue 1\.00e\+00",
    ):
        null_space(torch.eye(M).double(), rule, value)


def test_projector_of_a_layer_is_computed_once():
    stats = LayerStats(moment_with([0.001, 1.0, 2.0]), "threshold", 0.1)
    assert stats.projector is stats.projector
    assert stats.projector.kept == 1
