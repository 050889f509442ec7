"""Every solver against the formula it stands for, written out in float64 on small matrices."""

import pytest
import torch
from torch import Tensor

from nmke.config import EditConfig
from nmke.editors import methods
from nmke.editors.alphaedit import AlphaEdit
from nmke.editors.betaedit import BetaEdit
from nmke.editors.emmet import Emmet
from nmke.editors.memit import CovarianceSolver
from nmke.editors.memory import KeyMemory
from nmke.editors.nmke_linear import Nmke
from nmke.editors.nse import NeuronLevel, most_active
from nmke.editors.rome import Rome
from nmke.editors.solve import solve_positive
from nmke.errors import NumericsError
from nmke.stats.covariance import LayerStats

M, D, B = 9, 5, 3  # neurons, d_model, edits
CONFIG = EditConfig.create(l2=0.7, covariance_weight=2.5)


def random(*shape: int, seed: int = 0) -> Tensor:
    """Float64 numbers that float32 holds exactly, so that the float32 key memory loses nothing."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


KEYS, RESIDUALS, PAST = random(B, M, seed=1), random(B, D, seed=2), random(4, M, seed=3)
SAMPLE = random(200, M, seed=4) * torch.linspace(0.05, 2, M, dtype=torch.float64)
MOMENT = SAMPLE.T @ SAMPLE / len(SAMPLE)
SOLVERS = [name for name in methods.names() if methods.get(name).solver is not None]
SOME = torch.tensor([1, 0, 1, 1, 0, 0, 1, 1, 0], dtype=torch.bool)


def stats(share: float = 0.4, moment: Tensor = MOMENT) -> LayerStats:
    return LayerStats(moment, "share", share)


def remembered(past: Tensor) -> KeyMemory:
    return KeyMemory.empty(M).remember(past)


def collapsed(past: Tensor) -> KeyMemory:
    """The same memory after its rows were folded into their second moment."""
    return KeyMemory(torch.zeros(0, M), past.T @ past, len(past))


def null_projector(moment: Tensor, share: float) -> Tensor:
    _, vectors = torch.linalg.eigh(moment)
    basis = vectors[:, : round(share * M)]
    return basis @ basis.T


def published_alphaedit(past: Tensor, share: float, l2: float) -> Tensor:
    """ΔW [d m] from the non-symmetric system as published: (P(K Kᵀ + Cp) + λI) ΔWᵀ = P K Rᵀ."""
    projector = null_projector(MOMENT, share)
    k = KEYS.T
    system = projector @ (k @ k.T + past.T @ past) + l2 * torch.eye(M, dtype=torch.float64)
    return torch.linalg.solve(system, projector @ k @ RESIDUALS).T


@pytest.mark.parametrize("share", [0.3, 0.8], ids=["basis", "complement"])
@pytest.mark.parametrize("memory", [remembered, collapsed], ids=["dual", "reduced"])
def test_alphaedit_equals_the_published_system(share, memory):
    assert stats(share).projector.complement is (share > 0.5)
    directions = AlphaEdit().directions(KEYS, stats(share), memory(PAST), None, CONFIG)
    torch.testing.assert_close(
        RESIDUALS.T @ directions, published_alphaedit(PAST, share, 0.7), rtol=1e-9, atol=1e-11
    )


def test_alphaedit_with_rows_behind_a_collapsed_memory_counts_both():
    older, newer = PAST[:2], PAST[2:]
    memory = KeyMemory(newer.float(), older.T @ older, len(PAST))
    directions = AlphaEdit().directions(KEYS, stats(), memory, None, CONFIG)
    torch.testing.assert_close(
        RESIDUALS.T @ directions, published_alphaedit(PAST, 0.4, 0.7), rtol=1e-9, atol=1e-11
    )


def test_alphaedit_without_earlier_edits_equals_the_published_system():
    directions = AlphaEdit().directions(KEYS, stats(), KeyMemory.empty(M), None, CONFIG)
    expected = published_alphaedit(torch.zeros(0, M, dtype=torch.float64), 0.4, 0.7)
    torch.testing.assert_close(RESIDUALS.T @ directions, expected, rtol=1e-9, atol=1e-11)


def test_alphaedit_writes_nothing_outside_the_null_space():
    directions = AlphaEdit().directions(KEYS, stats(), remembered(PAST), None, CONFIG)
    outside = torch.eye(M, dtype=torch.float64) - null_projector(MOMENT, 0.4)
    assert (directions @ outside).abs().max() < 1e-12


def test_alphaedit_mask_zeroes_the_other_columns_of_the_full_solution():
    full = AlphaEdit().directions(KEYS, stats(), remembered(PAST), None, CONFIG)
    masked = AlphaEdit().directions(KEYS, stats(), remembered(PAST), SOME, CONFIG)
    assert torch.equal(masked, full * SOME)


def test_memit_equals_its_closed_form_and_ignores_earlier_edits():
    config = EditConfig.create(l2=0.0, covariance_weight=2.5)
    directions = CovarianceSolver(remember=False).directions(KEYS, stats(), remembered(PAST), None, config)
    expected = torch.linalg.inv(2.5 * MOMENT + KEYS.T @ KEYS) @ KEYS.T @ RESIDUALS
    torch.testing.assert_close(RESIDUALS.T @ directions, expected.T, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("memory", [remembered, collapsed])
def test_memit_with_memory_equals_its_closed_form(memory):
    config = EditConfig.create(l2=0.0, covariance_weight=2.5)
    directions = CovarianceSolver(remember=True).directions(KEYS, stats(), memory(PAST), None, config)
    expected = torch.linalg.inv(2.5 * MOMENT + KEYS.T @ KEYS + PAST.T @ PAST) @ KEYS.T @ RESIDUALS
    torch.testing.assert_close(RESIDUALS.T @ directions, expected.T, rtol=1e-9, atol=1e-11)


def objective(update: Tensor) -> Tensor:
    """What the mask-consistent update minimises, for ΔW [d m]."""
    return (
        2.5 * torch.trace(update @ MOMENT @ update.T)
        + (update @ KEYS.T - RESIDUALS.T).square().sum()
        + (update @ PAST.T).square().sum()
        + 0.7 * update.square().sum()
    )


@pytest.mark.parametrize("memory", [remembered, collapsed])
def test_in_solve_mask_gives_the_constrained_least_squares_minimiser(memory):
    factor = torch.linalg.cholesky(MOMENT)  # tr(D C0 Dᵀ) = ‖D factor‖²
    seen = torch.cat(
        [2.5**0.5 * factor.T, KEYS, PAST, 0.7**0.5 * torch.eye(M, dtype=torch.float64)]
    )  # [rows m]
    wanted = torch.zeros(len(seen), D, dtype=torch.float64)
    wanted[M : M + B] = RESIDUALS
    expected = torch.zeros(D, M, dtype=torch.float64)
    expected[:, SOME] = torch.linalg.lstsq(seen[:, SOME], wanted, driver="gelsd").solution.T

    for solver in (CovarianceSolver(remember=True), Nmke()):
        update = RESIDUALS.T @ solver.directions(KEYS, stats(), memory(PAST), SOME, CONFIG)
        torch.testing.assert_close(update, expected, rtol=1e-9, atol=1e-11)
        assert not update[:, ~SOME].any()
    for seed in range(20):
        change = 1e-3 * random(D, M, seed=seed) * SOME
        assert objective(update + change) > objective(update)


def test_in_solve_mask_reaches_more_of_the_residual_than_masking_afterwards():
    config = EditConfig.create(l2=1e-3, covariance_weight=1e-3)
    solver = CovarianceSolver(remember=False)
    inside = solver.directions(KEYS, stats(), KeyMemory.empty(M), SOME, config)
    after = solver.directions(KEYS, stats(), KeyMemory.empty(M), None, config) * SOME
    missed = [(RESIDUALS.T @ (x @ KEYS.T) - RESIDUALS.T).norm() for x in (inside, after)]
    assert missed[0] < 0.1 * missed[1]


def test_rome_writes_its_value_exactly():
    config = EditConfig.create(l2=0.0)
    key, value = KEYS[:1], random(1, D, seed=7)
    weight = random(D, M, seed=8)
    residual = value - key @ weight.T
    directions = Rome().directions(key, stats(), KeyMemory.empty(M), None, config)
    torch.testing.assert_close((weight + residual.T @ directions) @ key[0], value[0], rtol=1e-10, atol=1e-12)
    solved = torch.linalg.inv(MOMENT) @ key[0]
    expected = torch.outer(residual[0], solved) / (key[0] @ solved)
    torch.testing.assert_close(residual.T @ directions, expected, rtol=1e-9, atol=1e-11)


def test_rome_meets_every_key_of_a_fact_with_two_anchors():
    directions = Rome().directions(KEYS[:2], stats(), KeyMemory.empty(M), None, EditConfig.create(l2=0.0))
    update = RESIDUALS[:2].T @ directions
    torch.testing.assert_close(update @ KEYS[:2].T, RESIDUALS[:2].T, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("alpha", [0.0, 0.7])
def test_emmet_equals_its_closed_form_and_without_alpha_meets_every_value(alpha):
    directions = Emmet().directions(
        KEYS, stats(), remembered(PAST), None, EditConfig.create(l2=alpha, covariance_weight=1.0)
    )
    inverse, k = torch.linalg.inv(MOMENT), KEYS.T
    inner = k.T @ inverse @ k + alpha * torch.eye(B, dtype=torch.float64)
    expected = (inverse @ k @ torch.linalg.inv(inner) @ RESIDUALS).T
    torch.testing.assert_close(RESIDUALS.T @ directions, expected, rtol=1e-9, atol=1e-11)
    met = torch.allclose(RESIDUALS.T @ directions @ k, RESIDUALS.T, rtol=1e-9, atol=1e-11)
    assert met is (alpha == 0.0)


@pytest.mark.parametrize("share", [0.3, 0.8], ids=["basis", "complement"])
@pytest.mark.parametrize("memory", [remembered, collapsed])
def test_betaedit_adds_ordinary_keys_inside_the_null_space(memory, share):
    directions = BetaEdit().directions(KEYS, stats(share), memory(PAST), None, CONFIG)
    projector, k = null_projector(MOMENT, share), KEYS.T
    system = projector @ (k @ k.T + PAST.T @ PAST + 2.5 * MOMENT) @ projector
    system = system + 0.7 * torch.eye(M, dtype=torch.float64)
    expected = (projector @ torch.linalg.solve(system, projector @ k @ RESIDUALS)).T
    torch.testing.assert_close(RESIDUALS.T @ directions, expected, rtol=1e-9, atol=1e-11)


def test_nse_solves_on_the_fewest_neurons_that_hold_its_share_of_the_activation():
    strength = KEYS.abs().mean(dim=0).tolist()
    chosen: set[int] = set()
    while sum(strength[i] for i in chosen) < 0.8 * sum(strength):
        chosen.add(max(set(range(M)) - chosen, key=lambda i: strength[i]))
    index = torch.tensor(sorted(chosen))
    assert 2 < len(index) < M
    assert most_active(KEYS, 0.8).nonzero().flatten().tolist() == index.tolist()
    part, k = MOMENT[index][:, index], KEYS[:, index].T
    expected = torch.zeros(D, M, dtype=torch.float64)
    expected[:, index] = (torch.linalg.inv(2.5 * part + k @ k.T) @ k @ RESIDUALS).T
    config = EditConfig.create(l2=0.0, covariance_weight=2.5)
    directions = NeuronLevel(0.8).directions(KEYS, stats(), remembered(PAST), None, config)
    torch.testing.assert_close(RESIDUALS.T @ directions, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", SOLVERS)
def test_mask_of_ones_equals_no_mask_and_of_zeros_changes_nothing(name):
    method = methods.get(name)
    config = EditConfig.create(**{"l2": 0.7, **method.defaults})
    if config.covariance_weight is None:
        config = config.filled({"covariance_weight": 2.5})
    keys = KEYS[: method.max_batch]
    arguments = (keys, stats(), remembered(PAST))
    free = method.solver.directions(*arguments, None, config)
    every = method.solver.directions(*arguments, torch.ones(M, dtype=torch.bool), config)
    nothing = method.solver.directions(*arguments, torch.zeros(M, dtype=torch.bool), config)
    assert torch.equal(free, every)
    assert nothing.shape == free.shape and not nothing.any()


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_keys_that_are_not_finite_are_refused(name, bad):
    method = methods.get(name)
    config = EditConfig.create(l2=0.7).filled({"covariance_weight": 2.5})
    config = method.fill(config)
    keys = KEYS[: method.max_batch].clone()
    keys[0, 2] = bad
    with pytest.raises(NumericsError, match=r"holds NaN or infinity.*(raise `l2`|nmke prepare)"):
        method.solver.directions(keys, stats(), remembered(PAST), None, config)


def test_singular_systems_are_refused():
    flat = torch.zeros(M, M, dtype=torch.float64)
    flat[0, 0] = 1.0
    config = EditConfig.create(l2=0.0, covariance_weight=1.0)
    problem = "(is not positive definite|has condition number).*"
    with pytest.raises(NumericsError, match=rf"w0·C0 \+ K Kᵀ \+ λI {problem}raise `l2`"):
        CovarianceSolver(remember=True).directions(KEYS, stats(moment=flat), remembered(PAST), None, config)
    with pytest.raises(NumericsError, match=rf"C0 \+ λI {problem}collect more tokens"):
        Rome().directions(KEYS[:1], stats(moment=flat), remembered(PAST), None, config)
    twice = torch.cat([KEYS, KEYS])
    with pytest.raises(NumericsError, match=rf"λI \+ Kᵀ P K {problem}raise `l2`"):
        AlphaEdit().directions(twice, stats(), remembered(PAST), None, config)
    with pytest.raises(NumericsError, match=rf"Uᵀ\(K Kᵀ \+ Cp\)U \+ λI {problem}raise `l2`"):
        AlphaEdit().directions(KEYS[:1], stats(0.8), collapsed(PAST[:1]), None, config)


def test_solve_positive_solves_and_names_what_is_ill_conditioned():
    system = torch.diag(torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64))
    right = torch.ones(3, 2, dtype=torch.float64)
    assert torch.allclose(
        system @ solve_positive(system, right, what="the system", cure="nothing"), right, rtol=1e-15
    )
    with pytest.raises(NumericsError, match=r"the system is not positive definite \(minor 2 of 3\): do that"):
        solve_positive(
            system - 2.5 * torch.diag(torch.tensor([0, 1, 0])), right, what="the system", cure="do that"
        )
    n = 14
    hilbert = 1 / (torch.arange(n).double()[:, None] + torch.arange(n).double() + 1)
    noisy = torch.randn(n, 1, generator=torch.Generator().manual_seed(0)).double()
    with pytest.raises(NumericsError, match=r"hilbert (has condition number|is not positive definite)"):
        solve_positive(hilbert, noisy, what="hilbert", cure="none")
