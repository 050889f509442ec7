"""Stability measures against closed forms and slow literal versions, in float64 on small matrices."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nmke.errors import NumericsError
from nmke.stability import column_cosines, compare, project_columns, singular_values, wasserstein


def matrix(rows: int = 6, columns: int = 9, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_an_unchanged_matrix_has_not_moved() -> None:
    found = compare(matrix(), matrix())
    assert (found.relative_norm, found.wasserstein, found.changed) == (0.0, 0.0, 0)
    assert (found.cosine_mean, found.cosine_std, found.cosine_min) == (1.0, 0.0, 1.0)
    assert found.singular_before == found.singular_after and found.spectral_growth == 1.0


def test_doubling_a_matrix_changes_norms_but_no_direction() -> None:
    before = matrix()
    found = compare(before, 2 * before)
    assert found.relative_norm == pytest.approx(1.0)
    assert (
        found.wasserstein
        == pytest.approx(found.mean_column_norm)
        == pytest.approx(float(before.norm(dim=0).mean()))
    )
    assert found.cosine_mean == pytest.approx(1.0) and found.cosine_min == pytest.approx(1.0)
    assert found.spectral_growth == pytest.approx(2.0)
    assert found.changed == found.columns == 9


def test_turning_columns_changes_directions_but_no_norm() -> None:
    before = matrix(2, 5)
    angle = 0.3
    turn = torch.tensor(
        [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]], dtype=torch.float64
    )
    found = compare(before, turn @ before)
    assert found.wasserstein == pytest.approx(0.0, abs=1e-12)
    assert found.cosine_mean == pytest.approx(math.cos(angle)) and found.cosine_std == pytest.approx(
        0.0, abs=1e-9
    )
    assert found.singular_after == pytest.approx(found.singular_before)


def test_only_changed_columns_are_counted() -> None:
    before = matrix()
    after = before.clone()
    after[0, 3] += 1.0
    after[5, 7] -= 2.0
    found = compare(before, after)
    assert (found.changed, found.columns) == (2, 9)
    assert found.relative_norm == pytest.approx(math.sqrt(5.0) / float(before.norm()))
    literal = [
        sum(a * b for a, b in zip(x.tolist(), y.tolist(), strict=True))
        / math.sqrt(float(x @ x) * float(y @ y))
        for x, y in zip(before.T, after.T, strict=True)
    ]
    assert column_cosines(before, after).tolist() == pytest.approx(literal)


def test_cosine_of_zero_columns() -> None:
    before, after = torch.zeros(3, 3), torch.zeros(3, 3)
    before[:, 2] = after[:, 1] = 1.0
    assert column_cosines(before, after).tolist() == [1.0, 0.0, 0.0]


@given(
    st.lists(st.floats(0, 10), min_size=3, max_size=3),
    st.lists(st.floats(0, 10), min_size=3, max_size=3),
)
def test_wasserstein_is_the_cheapest_matching(first: list[float], second: list[float]) -> None:
    import itertools

    cheapest = min(
        sum(abs(a - b) for a, b in zip(first, order, strict=True)) / 3
        for order in itertools.permutations(second)
    )
    found = wasserstein(torch.tensor(first, dtype=torch.float64), torch.tensor(second, dtype=torch.float64))
    assert found == pytest.approx(cheapest, abs=1e-9)


@pytest.mark.parametrize("shape", [(4, 7), (7, 4)])
def test_singular_values_agree_with_an_svd(shape: tuple[int, int]) -> None:
    given_ = matrix(*shape)
    assert singular_values(given_).tolist() == pytest.approx(torch.linalg.svdvals(given_).tolist())


def test_projection_shows_the_columns_that_moved_farthest_on_the_bases_main_axes() -> None:
    before = matrix(5, 40)
    before[2] *= 50.0  # nearly all variance lies along axis 2, most of the rest along axis 4
    before[4] *= 10.0
    after = before.clone()
    after[2, 11] += 1000.0
    found = project_columns(before, after, shown=8)
    assert len(found.index) == 8 and 11 in found.index.tolist()
    moved = (found.after - found.before)[found.index.tolist().index(11)]
    assert abs(float(moved[0])) == pytest.approx(1000.0, rel=0.01)
    still = [i for i, column in enumerate(found.index.tolist()) if column != 11]
    assert torch.equal(found.after[still], found.before[still])
    _, values, _ = torch.linalg.svd(before - before.mean(dim=1, keepdim=True))
    shares = (values**2 / (values**2).sum()).tolist()
    assert found.explained == pytest.approx((shares[0], shares[1]))
    same = project_columns(before, after, shown=8)
    assert torch.equal(same.before, found.before) and torch.equal(same.index, found.index)


def test_projection_shows_every_column_of_a_small_matrix_once() -> None:
    assert project_columns(matrix(3, 5), matrix(3, 5, seed=1)).index.tolist() == [0, 1, 2, 3, 4]


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(NumericsError, match=r"shape \(6, 9\) and \(5, 9\)"):
        compare(matrix(6, 9), matrix(5, 9))
    with pytest.raises(NumericsError, match="NaN or infinity"):
        compare(matrix(), matrix() / 0)
    with pytest.raises(NumericsError, match="base matrix is zero"):
        compare(torch.zeros(2, 2), torch.ones(2, 2))
