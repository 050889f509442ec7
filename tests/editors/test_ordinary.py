"""The system of ordinary and earlier keys against the literal inverse, and what it keeps in memory."""

import pytest
import torch
from torch import Tensor

from nmke.config import EditConfig
from nmke.editors.alphaedit import AlphaEdit
from nmke.editors.memory import KeyMemory
from nmke.editors.ordinary import BLOCK, CholeskyFactor, LeadingFactor, OrdinarySystem, ordinary_system
from nmke.editors.per_edit import per_edit_directions, write_directions
from nmke.errors import NumericsError
from nmke.stats.covariance import LayerStats, null_space

M, EDITS, WEIGHT, L2 = 60, 5, 3.0, 0.5


def rows(count: int, seed: int = 0, width: int = M) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def moment() -> Tensor:
    """Of keys whose directions differ in size by a factor of a thousand, as a model's do."""
    scaled = rows(400, 9) * torch.logspace(-1.5, 1.5, M, dtype=torch.float64)
    return scaled.T @ scaled / 400


def settings(**changes: object) -> EditConfig:
    base = {
        "mask": "none",
        "mask_scope": "edit",
        "attribution": "write",
        "covariance_weight": WEIGHT,
        "l2": L2,
    }
    return EditConfig.create(**{**base, **changes})


def literal(moment: Tensor, past: Tensor, keys: Tensor) -> Tensor:
    system = WEIGHT * moment + past.T @ past + L2 * torch.eye(M, dtype=torch.float64)
    return torch.linalg.solve(system, keys.T).T


@pytest.mark.parametrize("past", [0, 1, BLOCK, 2 * BLOCK + 3, M])
def test_directions_equal_the_primal_solution_to_float64_rounding(moment, past):
    keys, earlier = rows(EDITS), rows(past, 1).float()
    memory = KeyMemory.empty(M).remember(earlier)
    found = write_directions(keys, LayerStats(moment), memory, settings())
    expected = literal(moment, earlier.double(), keys)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12 * float(expected.abs().max()))


def test_beyond_as_many_keys_as_neurons_the_primal_system_takes_over(moment):
    earlier = rows(M + 7, 1).float()
    memory = KeyMemory.empty(M).remember(earlier)
    assert memory.gram is not None
    found = write_directions(rows(EDITS), LayerStats(moment), memory, settings())
    torch.testing.assert_close(found, literal(moment, earlier.double(), rows(EDITS)), rtol=1e-9, atol=1e-12)


def test_a_run_that_grows_batch_by_batch_has_the_bits_of_one_that_is_opened_again(moment):
    stats, earlier = LayerStats(moment), rows(50, 1).float()
    for count in (7, 16, 20, 41, 50):
        memory = KeyMemory.empty(M).remember(earlier[:count])
        grown = write_directions(rows(EDITS), stats, memory, settings())
        again = write_directions(rows(EDITS), LayerStats(moment), memory, settings())
        assert torch.equal(grown, again)


def test_a_released_key_is_solved_without(moment):
    stats, earlier = LayerStats(moment), rows(40, 1).float()
    memory = KeyMemory.empty(M).remember(earlier)
    write_directions(rows(EDITS), stats, memory, settings())
    left = write_directions(rows(EDITS), stats, memory.release(earlier[20:21]), settings())
    without = torch.cat([earlier[:20], earlier[21:]]).double()
    torch.testing.assert_close(left, literal(moment, without, rows(EDITS)), rtol=1e-10, atol=1e-12)


def test_nothing_is_factored_and_no_key_solved_for_twice(moment, monkeypatch):
    counts: list[int] = []
    plain = CholeskyFactor.solve

    def counted(self: CholeskyFactor, keys: Tensor) -> Tensor:
        counts.append(len(keys))
        return plain(self, keys)

    monkeypatch.setattr(CholeskyFactor, "solve", counted)
    stats, memory = LayerStats(moment), KeyMemory.empty(M)
    for turn in range(5):
        write_directions(rows(EDITS, turn), stats, memory, settings())
        memory = memory.remember(rows(8, 100 + turn).float())
    assert len(stats.systems) == 1
    of_batches = 5 * EDITS
    assert (
        sum(counts) - of_batches <= 32 + 2 * 8
    )  # whole blocks once; what is left of one at most once more each


def test_all_directions_one_by_one_are_the_whole_matrix(moment):
    whole = LeadingFactor.of(moment, WEIGHT, L2, M)
    torch.testing.assert_close(
        whole.solve(rows(EDITS)),
        CholeskyFactor.of(moment, WEIGHT, L2).solve(rows(EDITS)),
        rtol=1e-9,
        atol=1e-11,
    )


def test_leading_directions_are_exact_and_the_rest_have_their_mean(moment):
    rank = 20
    values, vectors = torch.linalg.eigh(moment)
    small, large = values[:-rank], values[-rank:]
    eigenvalues = torch.cat([small.mean().expand(M - rank), large])
    expected = torch.linalg.inv(
        WEIGHT * vectors @ torch.diag(eigenvalues) @ vectors.T + L2 * torch.eye(M, dtype=torch.float64)
    )
    found = LeadingFactor.of(moment, WEIGHT, L2, rank)
    torch.testing.assert_close(found.solve(rows(EDITS)), rows(EDITS) @ expected, rtol=1e-9, atol=1e-12)
    system = ordinary_system(LayerStats(moment), settings(covariance_rank=rank))
    assert isinstance(system.factor, LeadingFactor) and not system.keeps
    past = rows(4, 1)
    dense = torch.linalg.inv(torch.linalg.inv(expected) + past.T @ past)
    torch.testing.assert_close(system.solve(rows(EDITS), past), rows(EDITS) @ dense, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("rank", [None, 20])
def test_a_moment_that_is_not_finite_or_not_positive_is_refused(rank):
    config = settings(covariance_rank=rank)
    with pytest.raises(NumericsError, match=r"w0·C0 \+ λI holds NaN or infinity: raise `l2`"):
        ordinary_system(LayerStats(torch.full((M, M), float("nan"))), config)
    with pytest.raises(NumericsError, match=r"w0·C0 \+ λI is not positive definite"):
        ordinary_system(LayerStats(-torch.eye(M, dtype=torch.float64)), config)


# --- memory: five layers of an 8B model (d_mlp 14336), 2000 edits, at one 128th of the width ------------------------

NEURONS, REMEMBERED, LAYERS, SHRUNK = 14_336, 2_000, 5, 128
LIMIT = 1.5 * 2**30


def kept_numbers(stats: LayerStats, memory: KeyMemory) -> int:
    """Numbers held in tensors between two batches of a layer; one storage is counted once."""
    held: dict[int, int] = {}

    def walk(value: object) -> None:
        if isinstance(value, Tensor):
            held[value.untyped_storage().data_ptr()] = (
                value.untyped_storage().nbytes() // value.element_size()
            )
        elif isinstance(value, dict):
            for item in value.values():
                walk(item)
        elif hasattr(value, "__dict__"):
            walk(vars(value))

    walk(stats)
    walk(memory)
    return sum(held.values())


@pytest.mark.parametrize("method", ["nmke-linear", "alphaedit"])
def test_editor_state_of_five_8b_layers_fits_its_budget(method):
    """Real state at a small shape has d_mlp·(edits + rank) numbers; at full size, in float32, that fits."""
    d_mlp, edits = NEURONS // SHRUNK, REMEMBERED // SHRUNK
    rank = 3_500 // SHRUNK
    spread = rows(400, 2, d_mlp) * torch.logspace(-2, 1, d_mlp, dtype=torch.float64)
    moment = (spread.T @ spread / 400).float()
    stats = LayerStats(moment.clone, "share", 1 - rank / d_mlp)  # as a large layer's, not held
    memory = KeyMemory.empty(d_mlp).remember(rows(edits, 3, d_mlp).float())
    keys = rows(EDITS, 4, d_mlp)
    if method == "nmke-linear":
        per_edit_directions(keys, stats, memory, settings(covariance_rank=rank, mask="entropy"))
    else:
        AlphaEdit().directions(keys, stats, memory, None, settings(l2=10.0))
    numbers = kept_numbers(stats, memory)
    formula = d_mlp * (edits + rank)
    assert formula <= numbers <= formula + 2 * d_mlp + rank
    at_full_size = 4 * LAYERS * (NEURONS * (REMEMBERED + 3_500) + 2 * NEURONS + 3_500)
    assert at_full_size <= LIMIT
    assert 4 * LAYERS * NEURONS**2 > 2 * LIMIT  # a single d_mlp² matrix per layer would not fit


def test_the_null_space_of_a_large_layer_is_kept_in_its_statistics_own_type():
    moment = torch.diag(torch.logspace(-3, 2, M))
    assert null_space(moment.float(), "share", 0.7).basis.dtype == torch.float32
    assert null_space(moment.double(), "share", 0.7).basis.dtype == torch.float64


def test_a_system_without_earlier_keys_is_the_factor_alone(moment):
    factor = CholeskyFactor.of(moment, WEIGHT, L2)
    assert torch.equal(OrdinarySystem(factor).solve(rows(EDITS), rows(0)), factor.solve(rows(EDITS)))
