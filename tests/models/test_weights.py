"""DownProjection reads, adds and restores alike for both layouts, and touches only what it should."""

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from nmke.errors import LayoutError, NumericsError
from nmke.models.weights import DownProjection, written_matrix

D_MODEL, D_MLP = 4, 6
KINDS = ("linear", "conv1d")


def projection(kind: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, DownProjection]:
    module = nn.Linear(D_MLP, D_MODEL) if kind == "linear" else Conv1D(D_MODEL, D_MLP)
    with torch.no_grad():
        module.weight.copy_(torch.randn(module.weight.shape, generator=torch.Generator().manual_seed(0)))
    module = module.to(dtype)
    return module, DownProjection(module)


def update(*, zero: tuple[int, ...] = (), dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    left = torch.randn(D_MODEL, 2, generator=generator, dtype=dtype)
    right = torch.randn(2, D_MLP, generator=generator, dtype=dtype)
    right[:, list(zero)] = 0
    return left, right


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.int16 if tensor.element_size() == 2 else torch.int32)


@pytest.mark.parametrize("kind", KINDS)
def test_read_is_a_view_that_maps_neurons_to_the_stream(kind: str) -> None:
    module, matrix = projection(kind)
    assert matrix.shape == (D_MODEL, D_MLP)
    neurons = torch.randn(3, D_MLP)
    torch.testing.assert_close(module(neurons) - module.bias, neurons @ matrix.read().T)
    assert matrix.read().data_ptr() == module.weight.data_ptr()
    assert not matrix.read().requires_grad


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_add_rounds_once_and_leaves_other_columns_alone(kind: str, dtype: torch.dtype) -> None:
    module, matrix = projection(kind, dtype)
    before = matrix.read().clone()
    address = module.weight.data_ptr()
    left, right = update(zero=(1, 4))
    matrix.add(left, right)
    expected = (before.float() + left @ right).to(dtype)
    touched = [0, 2, 3, 5]
    torch.testing.assert_close(matrix.read()[:, touched], expected[:, touched], rtol=1e-6, atol=1e-7)
    assert torch.equal(bits(matrix.read()[:, [1, 4]]), bits(before[:, [1, 4]]))
    assert module.weight.data_ptr() == address


def test_add_leaves_minus_zero_and_nan_in_untouched_columns() -> None:
    _, matrix = projection("linear")
    odd = torch.tensor([-0.0, float("nan"), float("inf"), 1.0])
    matrix.read()[:, 1] = odd
    matrix.add(*update(zero=(1,)))
    assert torch.equal(bits(matrix.read()[:, 1]), bits(odd))


@pytest.mark.parametrize("kind", KINDS)
def test_add_takes_float64_and_uses_it(kind: str) -> None:
    _, matrix = projection(kind)
    before = matrix.read().clone()
    left, right = update(dtype=torch.float64)
    matrix.add(left, right)
    assert torch.equal(matrix.read(), (before.double() + left @ right).float())


def test_add_of_zeros_changes_nothing() -> None:
    _, matrix = projection("linear")
    before = matrix.read().clone()
    matrix.add(torch.ones(D_MODEL, 2), torch.zeros(2, D_MLP))
    assert torch.equal(bits(matrix.read()), bits(before))


def test_add_works_where_gradients_are_on() -> None:
    module, matrix = projection("linear")
    assert module.weight.requires_grad
    matrix.add(*update())
    assert module.weight.grad_fn is None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_restore_gives_every_bit_back(kind: str, dtype: torch.dtype) -> None:
    _, matrix = projection(kind, dtype)
    before = matrix.read().clone()
    index = torch.tensor([5, 0, 3])
    image = matrix.columns(index)
    matrix.add(*update(zero=(1, 2, 4)))
    assert not torch.equal(matrix.read(), before)
    matrix.restore(index, image)
    assert torch.equal(bits(matrix.read()), bits(before))


@pytest.mark.parametrize("kind", KINDS)
def test_columns_are_copies_in_the_order_asked_for(kind: str) -> None:
    _, matrix = projection(kind)
    before = matrix.read().clone()
    image = matrix.columns(torch.tensor([4, 1]))
    assert torch.equal(image, before[:, [4, 1]])
    image.zero_()
    assert torch.equal(matrix.read(), before)


def test_an_update_that_overflows_is_refused_and_writes_nothing() -> None:
    _, matrix = projection("linear", torch.float16)
    before = matrix.read().clone()
    with pytest.raises(NumericsError, match=r"6 of 6 columns .* NaN or infinity .*torch.float16; raise l2"):
        matrix.add(torch.full((D_MODEL, 1), 1e6), torch.ones(1, D_MLP))
    assert torch.equal(matrix.read(), before)


def test_columns_of_another_type_are_refused() -> None:
    _, matrix = projection("linear", torch.bfloat16)
    with pytest.raises(NumericsError, match=r"torch.float32 were given for weights of type torch.bfloat16"):
        matrix.restore(torch.tensor([0]), torch.zeros(D_MODEL, 1))


def test_another_module_is_refused() -> None:
    with pytest.raises(LayoutError, match=r"neither nn\.Linear nor Conv1D"):
        DownProjection(nn.Embedding(3, 4))
    with pytest.raises(LayoutError, match="'Identity'"):
        written_matrix(nn.Identity())
