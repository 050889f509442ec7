"""Which neurons are kept: exact ratios, ties, unions and controls."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nmke.config import EditConfig
from nmke.errors import ConfigError, NumericsError
from nmke.masking.entropy import general_entropy, specific_entropy
from nmke.masking.select import (
    general_scores,
    keep_quantile,
    keep_top,
    random_mask,
    select_neurons,
    specific_scores,
)

M = 200
MASKS = ("entropy", "random", "general", "specific", "overlap", "non-overlap", "fixed")


def some_scores(prompts: int = 6, d_mlp: int = M, seed: int = 0) -> Tensor:
    return 0.1 * torch.randn(prompts, d_mlp, generator=torch.Generator().manual_seed(seed))


def config(mask: str = "entropy", **settings: object) -> EditConfig:
    return EditConfig.create(mask=mask, **settings)


def test_general_score_counts_prompts_above_zero():
    table = torch.tensor([[1.0, -1.0, 0.0], [0.5, 0.1, -3.0]])
    assert general_scores(table).tolist() == [2, 1, 0]


def test_released_general_score_counts_prompts_above_their_mean():
    table = torch.tensor([[1.0, 2.0, 9.0], [-5.0, -4.0, -1.0], [3.0, 3.0, 3.0]])  # means 4, -3.3, 3
    assert general_scores(table, "released").tolist() == [0, 0, 2]


def test_specific_score_is_the_best_over_prompts():
    table = torch.tensor([[1.0, -1.0, 0.0], [0.5, 0.1, -3.0]])
    torch.testing.assert_close(specific_scores(table), torch.tensor([1.0, 0.1, 0.0]).double())


def test_keep_top_breaks_ties_by_the_second_ranking_then_by_index():
    ranking = torch.tensor([2.0, 2.0, 1.0, 2.0, 0.0])
    ties = torch.tensor([0.1, 0.3, 9.0, 0.2, 9.0])
    assert keep_top(ranking, 0.4, ties).nonzero().flatten().tolist() == [1, 3]
    assert keep_top(ranking, 0.4).nonzero().flatten().tolist() == [0, 1]
    assert keep_top(ranking, 0.8, ties).nonzero().flatten().tolist() == [0, 1, 2, 3]


@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=60),
    st.floats(0.001, 1.0),
    st.booleans(),
)
def test_keep_top_keeps_exactly_the_ratio_whatever_the_ties(values: list[int], ratio: float, second: bool):
    ranking = torch.tensor(values, dtype=torch.float64)
    ties = torch.arange(len(values)).double() if second else None
    keep = keep_top(ranking, ratio, ties)
    assert int(keep.sum()) == max(1, round(ratio * len(values)))
    if not keep.all():
        assert ranking[keep].min() >= ranking[~keep].max()


def test_released_quantile_keeps_all_ties():
    ranking = torch.tensor([0.0] * 4 + [3.0] * 6)
    assert keep_quantile(ranking, 0.3).sum() == 6
    assert keep_top(ranking, 0.3).sum() == 3
    distinct = torch.arange(10).double()
    assert torch.equal(keep_quantile(distinct, 0.3), keep_top(distinct, 0.3))


@pytest.mark.parametrize("seed", range(3))
def test_paper_variant_gets_the_ratios_it_asks_for(seed):
    table = some_scores(seed=seed)
    mask = select_neurons(table, config())
    general, specific = 0.3 + 0.1 * general_entropy(table), 0.2 + 0.1 * specific_entropy(table)
    assert mask.detail["general_ratio"] == pytest.approx(general)
    assert mask.detail["specific_ratio"] == pytest.approx(specific)
    assert mask.detail["general"] == round(general * M)
    assert mask.detail["specific"] == round(specific * M)
    assert mask.detail["kept"] == mask.count == general_and_specific(mask)
    assert mask.detail["d_mlp"] == M
    assert mask.ratio == pytest.approx(mask.count / M)


def general_and_specific(mask) -> float:
    return mask.detail["general"] + mask.detail["specific"] - mask.detail["overlap"]


def test_paper_general_neurons_by_hand():
    table = some_scores()
    keep = select_neurons(table, config("general")).keep
    order = sorted(
        range(M),
        key=lambda i: (int((table[:, i] > 0).sum()), float(table[:, i].double().mean())),
        reverse=True,
    )
    assert set(keep.nonzero().flatten().tolist()) == set(order[: int(keep.sum())])


def test_released_variant_keeps_more_than_it_asks_for():
    table = some_scores()
    mask = select_neurons(table, config(variant="released"))
    z = (table - table.mean(1, keepdim=True)) / table.std(1, keepdim=True)
    counts = (z > 0).sum(0).double()
    ratio = 0.3 + 0.1 * general_entropy(table) ** 3
    expected = counts >= torch.quantile(counts, 1 - ratio)
    assert mask.detail["general_ratio"] == pytest.approx(ratio)
    assert mask.detail["general"] == int(expected.sum()) > ratio * M
    best = table.max(0).values.double()
    special = best >= torch.quantile(best, 1 - (0.3 + 0.1 * specific_entropy(table) ** 2))
    assert torch.equal(mask.keep, expected | special)


def test_masks_are_made_of_general_and_specific_neurons():
    table = some_scores()
    keep = {mask: select_neurons(table, config(mask)).keep for mask in MASKS}
    assert torch.equal(keep["entropy"], keep["general"] | keep["specific"])
    assert torch.equal(keep["overlap"], keep["general"] & keep["specific"])
    assert torch.equal(keep["non-overlap"], keep["entropy"] & ~keep["overlap"])
    assert 0 < keep["overlap"].sum() < keep["specific"].sum() < keep["general"].sum() < keep["entropy"].sum()


def test_fixed_mask_uses_the_papers_ratios():
    mask = select_neurons(some_scores(), config("fixed"))
    assert (mask.detail["general"], mask.detail["specific"]) == (0.35 * M, 0.25 * M)
    with pytest.raises(
        ConfigError, match=r"mask 'fixed' is the paper's 0\.35/0\.25 ablation and takes no `ratio`"
    ):
        select_neurons(some_scores(), config("fixed", ratio=0.5))


def test_random_mask_has_the_size_of_the_one_it_controls_for():
    table = some_scores()
    wanted = select_neurons(table, config())
    found = [select_neurons(table, config("random"), seed=seed) for seed in (1, 1, 2)]
    assert all(mask.count == wanted.count for mask in found)
    assert torch.equal(found[0].keep, found[1].keep) and not torch.equal(found[0].keep, found[2].keep)
    assert select_neurons(table, config("random", ratio=0.1)).count == 0.1 * M
    assert select_neurons(table, config("random", ratio=1e-6)).count == 1


def test_random_mask_is_uniform_and_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    hits = torch.stack([random_mask(10, 3, seed) for seed in range(2000)]).double().mean(0)
    assert torch.equal(torch.rand(1), expected)
    assert (hits - 0.3).abs().max() < 0.05


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("variant", ["paper", "released"])
def test_scores_without_any_positive_still_give_a_mask(mask, variant):
    table = -some_scores().abs()
    found = select_neurons(table, config(mask, variant=variant))
    assert found.keep.dtype == torch.bool and found.keep.shape == (M,)
    if mask != "overlap":
        assert found.count > 0


@pytest.mark.parametrize("mask", MASKS)
def test_scores_that_are_not_finite_are_refused(mask):
    table = some_scores()
    table[0, 0] = float("nan")
    with pytest.raises(NumericsError, match="attribution scores are not finite"):
        select_neurons(table, config(mask))


def test_mask_none_selects_nothing():
    with pytest.raises(ConfigError, match="mask 'none' selects nothing; leave the mask out"):
        select_neurons(some_scores(), config("none"))


def test_one_prompt_and_half_precision_scores_work():
    for table in (some_scores(1), some_scores().bfloat16()):
        for variant in ("paper", "released"):
            assert 0 < select_neurons(table, config(variant=variant)).ratio < 1
