"""Sets drawn over all layers, and where they sit."""

import pytest
import torch

from nmke.neurons.depth import by_layer_counts, depth_profiles, top_general, top_specific


def placed(
    where: dict[int, list[int]], facts: int = 6, layers: int = 4, width: int = 5
) -> dict[int, torch.Tensor]:
    """Scores that are negative everywhere but at the neurons named."""
    scores = {layer: torch.full((facts, width), -1.0) for layer in range(layers)}
    for layer, neurons in where.items():
        scores[layer][:, neurons] = 1.0
    return scores


def test_general_neurons_are_those_that_count_in_most_prompts():
    scores = placed({3: [0, 4]})
    scores[0][0, 2] = 50.0  # loud, but in one prompt only
    keep = top_general(scores, 2)
    assert keep[3].tolist() == [True, False, False, False, True]
    assert sum(int(mask.sum()) for mask in keep.values()) == 2
    assert top_specific(scores, 1)[0].tolist() == [False, False, True, False, False]


def test_ties_go_to_the_higher_mean_score():
    scores = placed({0: [1], 2: [3]})
    scores[2][:, 3] = 2.0
    assert top_general(scores, 1)[2][3] and not top_general(scores, 1)[0].any()


def test_profile_of_a_set_in_the_last_layer():
    found = depth_profiles(placed({3: [0, 1]}), [2], resamples=20)[0]["general"]
    assert found.counts == (0, 0, 0, 2) and found.shares == (0, 0, 0, 1)
    assert found.centre == (1.0, 1.0, 1.0) and found.top_third[0] == 1.0
    assert found.evenness == pytest.approx(0.0, abs=1e-12)


def test_profile_of_a_set_spread_evenly():
    found = depth_profiles(placed({layer: [2] for layer in range(4)}), [4], resamples=20)[0]["general"]
    assert found.counts == (1, 1, 1, 1) and found.centre[0] == pytest.approx(0.5)
    assert found.evenness == pytest.approx(1.0)


def test_intervals_hold_the_mean_and_widen_with_disagreement():
    scores = placed({}, facts=12)
    for fact in range(12):  # half of the facts live in the first layer, half in the last
        scores[0 if fact % 2 else 3][fact] = torch.rand(5, generator=torch.Generator().manual_seed(fact)) + 1
    found = depth_profiles(scores, [4], resamples=200, seed=1)[0]["specific"]
    mean, low, high = found.centre
    assert low < mean < high and high - low > 0.1
    again = depth_profiles(scores, [4], resamples=200, seed=1)[0]["specific"]
    assert again == found


def test_overlap_is_counted_per_layer():
    scores = placed({1: [0, 1], 3: [4]})
    both = by_layer_counts(top_general(scores, 3), top_specific(scores, 3))
    assert both == [0, 2, 0, 1]
