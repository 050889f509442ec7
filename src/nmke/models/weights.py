"""A layer's MLP matrices with one column per neuron, read and written in place.

`nn.Linear` keeps its weight as [out, in], transformers' `Conv1D` as [in, out]; here both look alike. Column i of
the down-projection is what neuron i writes into the residual stream; column i of a matrix that feeds the neurons
(gate, up, or the only one) is what neuron i reads there, its bias below it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import reduce

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from nmke.errors import LayoutError, NumericsError

LINEAR_TYPES = (nn.Linear, Conv1D)


def written_matrix(module: nn.Module) -> Float[Tensor, "d_out d_in"]:
    """The weight of a linear layer as a view [d_out d_in], sharing memory with the parameter.

    Raises:
        LayoutError: If the module is neither `nn.Linear` nor `Conv1D`.
    """
    if isinstance(module, nn.Linear):
        return module.weight.detach()
    if isinstance(module, Conv1D):
        return module.weight.detach().T
    raise LayoutError(
        f"a module of type {type(module).__name__!r} was given as a linear layer; "
        "found neither nn.Linear nor Conv1D, load the model with unquantised weights and without adapters"
    )


class NeuronMatrix(ABC):
    """A matrix of an MLP whose column i belongs to neuron i; every write is in place."""

    @abstractmethod
    def read(self) -> Float[Tensor, "rows d_mlp"]:
        """The matrix as it is now; it may follow later writes, so clone it to keep it."""

    @property
    @abstractmethod
    def version(self) -> int:
        """Torch's write counter of the weights: it moves with every write."""

    @abstractmethod
    def put(self, index: Int[Tensor, " touched"], columns: Float[Tensor, "rows touched"]) -> None:
        """Write columns that are on the weights' device and of their type."""

    @torch.no_grad()
    def columns(self, index: Int[Tensor, " touched"]) -> Float[Tensor, "rows touched"]:
        """A copy of the columns at `index`, in the order asked for."""
        matrix = self.read()
        return matrix.index_select(1, index.to(matrix.device))

    @torch.no_grad()
    def restore(self, index: Int[Tensor, " touched"], columns: Float[Tensor, "rows touched"]) -> None:
        """Put columns back bit for bit, in place.

        Args:
            index: Which columns.
            columns: Their content, as `columns` gave it.

        Raises:
            NumericsError: If the type differs from the weights', since rounding would not be exact.
        """
        matrix = self.read()
        if columns.dtype != matrix.dtype:
            raise NumericsError(
                f"columns of type {columns.dtype} were given for weights of type {matrix.dtype}; "
                "an exact restore needs the same type, pass what `columns` returned"
            )
        self.put(index.to(matrix.device), columns.to(matrix.device))


class DownProjection(NeuronMatrix):
    """Reads, changes and restores the columns of one down-projection.

    Args:
        module: `nn.Linear` or `Conv1D` that writes d_model from d_mlp neurons.

    Raises:
        LayoutError: If the module is of another type.
    """

    def __init__(self, module: nn.Module) -> None:
        written_matrix(module)
        self._module = module

    @property
    def shape(self) -> tuple[int, int]:
        """Sizes d_model and d_mlp."""
        d_model, d_mlp = self.read().shape
        return d_model, d_mlp

    def read(self) -> Float[Tensor, "d_model d_mlp"]:
        """The matrix as it is now: a view, so that it follows later writes; clone it to keep it."""
        return written_matrix(self._module)

    @property
    def version(self) -> int:
        """See `NeuronMatrix.version`."""
        return self.read()._version

    def put(self, index: Int[Tensor, " touched"], columns: Float[Tensor, "d_model touched"]) -> None:
        """See `NeuronMatrix.put`."""
        self.read().index_copy_(1, index, columns)

    @torch.no_grad()
    def add(self, left: Float[Tensor, "d_model rank"], right: Float[Tensor, "rank d_mlp"]) -> None:
        """Add left @ right to the weights, in place, leaving every untouched column bit-identical.

        The sum is formed in float32 (float64 if any input is) and rounded once to the weights' own type.

        Args:
            left: What is written, one direction per column.
            right: How much of it per neuron; a column of zeros leaves that neuron's column alone.

        Raises:
            NumericsError: If the new columns are not finite; nothing is written then.
        """
        matrix = self.read()
        work = reduce(torch.promote_types, (left.dtype, right.dtype, matrix.dtype), torch.float32)
        touched = (right != 0).any(dim=0).nonzero().squeeze(1).to(matrix.device)
        left, right = left.to(matrix.device, work), right.to(matrix.device, work)
        columns = matrix[:, touched].to(work).addmm_(left, right[:, touched]).to(matrix.dtype)
        if not columns.isfinite().all():
            raise NumericsError(
                f"update of {len(touched)} of {matrix.shape[1]} columns was asked for; found NaN or infinity "
                f"after rounding to {matrix.dtype}; raise l2 or edit fewer facts at once"
            )
        self.put(touched, columns)


class ReadingMatrix(NeuronMatrix):
    """Reads, replaces and restores what neurons read through one linear layer: its rows, with their biases.

    Args:
        module: `nn.Linear` or `Conv1D` that gives d_mlp values from d_model.

    Raises:
        LayoutError: If the module is of another type.
    """

    def __init__(self, module: nn.Module) -> None:
        self._weight = written_matrix(module).T  # [d_model d_mlp]
        self._bias = module.bias.detach() if isinstance(module.bias, Tensor) else None

    @property
    def has_bias(self) -> bool:
        """Whether the last row is the bias."""
        return self._bias is not None

    def read(self) -> Float[Tensor, "rows d_mlp"]:
        """The matrix as it is now, [d_model, d_mlp], or [d_model + 1, d_mlp] with the bias as its last row.

        Without a bias it is a view and follows later writes; clone it to keep it.
        """
        return self._weight if self._bias is None else torch.cat([self._weight, self._bias[None]])

    @property
    def version(self) -> int:
        """See `NeuronMatrix.version`."""
        return self._weight._version + (0 if self._bias is None else self._bias._version)

    def put(self, index: Int[Tensor, " touched"], columns: Float[Tensor, "rows touched"]) -> None:
        """See `NeuronMatrix.put`."""
        self._weight.index_copy_(1, index, columns[: len(self._weight)])
        if self._bias is not None:
            self._bias.index_copy_(0, index, columns[-1])


@contextmanager
def swapped_in(matrices: Iterable[tuple[NeuronMatrix, Float[Tensor, "rows d_mlp"]]]) -> Iterator[None]:
    """Other content in place of some matrices inside the `with`; bit for bit as before behind it.

    Args:
        matrices: Each matrix and what stands in for its content.
    """
    swaps = list(matrices)
    now = [matrix.read().detach().clone() for matrix, _ in swaps]

    def put(contents: Iterable[Tensor]) -> None:
        for (matrix, _), content in zip(swaps, contents, strict=True):
            matrix.restore(torch.arange(content.shape[1]), content)

    try:
        put(content for _, content in swaps)
        yield
    finally:
        put(now)
