"""Masks of single edits, against values worked out by hand."""

import math

import pytest
import torch

from nmke.config import EditConfig
from nmke.errors import ConfigError
from nmke.masking.per_edit import EDIT_RATIO, check_mask, key_scores, select_per_edit, suits_edit


def settings(**changes: object) -> EditConfig:
    return EditConfig.create(**{"mask": "entropy", "mask_scope": "edit", "attribution": "write", **changes})


def test_an_edit_that_needs_many_neurons_keeps_more_than_one_that_needs_few():
    scores = torch.zeros(2, 200)
    scores[0, 7] = 3.0  # one neuron holds everything: entropy 0
    scores[1] = 1.0  # all are equal: entropy 1
    masks = select_per_edit(scores, settings())
    assert masks.keep.sum(dim=1).tolist() == [6, 16]  # 3 % and 8 % of 200
    assert masks.keep[0, 7]
    assert masks.detail["edit_entropy"] == pytest.approx(0.5)
    assert masks.detail["kept_per_edit"] == 11.0
    assert masks.detail["kept"] == float(masks.keep.any(dim=0).sum())


def test_the_ratio_lies_between_by_the_entropy_of_the_shares():
    scores = torch.zeros(1, 256)
    scores[0, :16] = 0.25  # sixteen equal shares: entropy log 16 / log 256 = 1/2
    kept = int(select_per_edit(scores, settings()).keep.sum())
    assert kept == round((EDIT_RATIO.low + EDIT_RATIO.span * math.log(16) / math.log(256)) * 256)


def test_the_highest_scores_are_kept():
    scores = torch.arange(50, dtype=torch.float64).repeat(3, 1)
    keep = select_per_edit(scores, settings(mask="fixed", ratio=0.1)).keep
    assert keep[:, 45:].all()
    assert int(keep.sum()) == 15


def test_random_masks_are_as_large_differ_between_edits_and_follow_the_seed():
    scores = torch.rand(3, 400, generator=torch.Generator().manual_seed(1))
    chosen = select_per_edit(scores, settings())
    drawn = select_per_edit(scores, settings(mask="random"), seed=5)
    assert torch.equal(drawn.keep.sum(dim=1), chosen.keep.sum(dim=1))
    assert not torch.equal(drawn.keep[0], drawn.keep[1])
    assert torch.equal(drawn.keep, select_per_edit(scores, settings(mask="random"), seed=5).keep)
    assert not torch.equal(drawn.keep, select_per_edit(scores, settings(mask="random"), seed=6).keep)


def test_no_mask_keeps_everything():
    assert select_per_edit(torch.rand(2, 30), settings(mask="none")).keep.all()


def test_key_scores_by_hand():
    keys = torch.tensor([[1.0, -2.0]], dtype=torch.float64)
    directions = torch.tensor([[-0.5, 0.25]], dtype=torch.float64)
    mean_squares = torch.tensor([0.5, 8.0], dtype=torch.float64)
    found = {entry.name: entry.value(keys, directions, mean_squares).tolist() for entry in key_scores}
    assert found == {"write": [[0.5, 0.25]], "energy": [[2.0, 0.5]], "mpc": [[1.0, 2.0]]}


@pytest.mark.parametrize(
    "changes",
    [{"mask": "general"}, {"mask": "fixed"}, {"placement": "after-solve"}, {"attribution": "lps"}],
    ids=lambda changes: next(iter(changes)),
)
def test_what_only_a_batch_has_does_not_suit_an_edit(changes):
    assert not suits_edit(settings(**changes))
    assert suits_edit(settings())
    if "attribution" not in changes:
        with pytest.raises(ConfigError, match="a mask per edit is in-solve"):
            check_mask(settings(**changes))
