"""The masked, recombined solve against literal formulas in float64."""

import pytest
import torch

from nmke.config import EditConfig
from nmke.editors.memit import CovarianceSolver
from nmke.editors.memory import KeyMemory
from nmke.editors.method import methods
from nmke.editors.per_edit import meet_residuals, per_edit_directions
from nmke.errors import NumericsError
from nmke.stats.covariance import LayerStats

EDITS, D_MLP, PAST = 4, 40, 3


def settings(**changes: object) -> EditConfig:
    base = {
        "mask": "fixed", "ratio": 0.3, "mask_scope": "edit", "attribution": "write",
        "covariance_weight": 2.0, "l2": 0.3, "residual_ridge": 0.0,
    }  # fmt: skip
    return EditConfig.create(**{**base, **changes})


@pytest.fixture(scope="module")
def system() -> tuple[torch.Tensor, LayerStats, KeyMemory]:
    generator = torch.Generator().manual_seed(3)
    keys = torch.randn(EDITS, D_MLP, generator=generator, dtype=torch.float64)
    text = torch.randn(200, D_MLP, generator=generator, dtype=torch.float64)
    past = torch.randn(PAST, D_MLP, generator=generator)
    return keys, LayerStats(text.T @ text / 200), KeyMemory.empty(D_MLP).remember(past)


def literal_directions(keys, stats, memory):
    gram = 2.0 * stats.moment + memory.rows.double().T @ memory.rows.double() + 0.3 * torch.eye(D_MLP)
    return torch.linalg.inv(gram.double()) @ keys.T  # B, [d_mlp, edits]


def test_each_edit_is_written_through_its_own_neurons_and_met_exactly(system):
    keys, stats, memory = system
    found, mask = per_edit_directions(keys, stats, memory, settings())
    directions = literal_directions(keys, stats, memory)
    masked = torch.zeros_like(directions)
    for edit in range(EDITS):
        own = directions[:, edit].abs().argsort(descending=True)[: round(0.3 * D_MLP)]
        masked[own, edit] = directions[own, edit]
    literal = masked @ torch.linalg.inv(keys @ masked)  # B (Kᵀ B)⁻¹, one column per residual
    torch.testing.assert_close(found.T, literal)
    torch.testing.assert_close(found @ keys.T, torch.eye(EDITS, dtype=torch.float64))
    assert torch.equal(mask.keep, (masked != 0).any(dim=1))
    assert (found[:, ~mask.keep] == 0).all()
    assert int(mask.keep.sum()) < D_MLP


def test_all_neurons_and_a_ridge_of_one_are_memit_with_a_memory(system):
    keys, stats, memory = system
    config = settings(mask="none", ratio=None, residual_ridge=1.0)
    found, mask = per_edit_directions(keys, stats, memory, config)
    expected = CovarianceSolver(remember=True).directions(keys, stats, memory, None, config)
    torch.testing.assert_close(found, expected)
    assert mask is None


def test_a_ratio_of_one_equals_no_mask(system):
    keys, stats, memory = system
    whole, _ = per_edit_directions(keys, stats, memory, settings(ratio=1.0))
    none, _ = per_edit_directions(keys, stats, memory, settings(mask="none", ratio=None))
    assert torch.equal(whole, none)


def test_the_same_key_twice_is_refused_without_a_ridge(system):
    keys, stats, memory = system
    double = torch.cat([keys, keys[:1]])
    with pytest.raises(NumericsError, match="residual_ridge"):
        per_edit_directions(double, stats, memory, settings())
    found, _ = per_edit_directions(double, stats, memory, settings(residual_ridge=0.1))
    assert torch.isfinite(found).all()


def test_keys_that_are_not_finite_are_refused():
    with pytest.raises(NumericsError, match="condition number"):
        meet_residuals(torch.full((2, 5), float("nan")), torch.ones(2, 5), 0.1)


def test_masks_that_only_a_batch_has_fall_back_to_one_mask_per_batch():
    method = methods.get("nmke-linear")
    assert method.fill(EditConfig.create(method="nmke-linear")).mask_scope == "edit"
    for asked in (
        {"mask": "general"},
        {"mask": "fixed"},
        {"attribution": "lps"},
        {"placement": "after-solve"},
    ):
        filled = method.fill(EditConfig.create(method="nmke-linear", **asked))
        assert (filled.mask_scope, filled.targets, filled.lr) == ("batch", "auto", 0.5)
    kept = method.fill(EditConfig.create(method="nmke-linear", mask="general", mask_scope="edit"))
    assert kept.mask_scope == "edit"  # asked for, so it stays, and is refused by name
