"""A layer's down-projection as one matrix [d_model d_mlp], read and written in place.

`nn.Linear` keeps its weight as [out, in], transformers' `Conv1D` as [in, out]; here both look alike. Column i
is what neuron i writes into the residual stream.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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


class DownProjection:
    """Reads, changes and restores the columns of one down-projection; every write is in place.

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
        matrix.index_copy_(1, touched, columns)

    @torch.no_grad()
    def columns(self, index: Int[Tensor, " touched"]) -> Float[Tensor, "d_model touched"]:
        """A copy of the columns at `index`, in the order asked for."""
        matrix = self.read()
        return matrix.index_select(1, index.to(matrix.device))

    @torch.no_grad()
    def restore(self, index: Int[Tensor, " touched"], columns: Float[Tensor, "d_model touched"]) -> None:
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
        matrix.index_copy_(1, index.to(matrix.device), columns.to(matrix.device))


@contextmanager
def swapped_in(
    matrices: Mapping[int, tuple[DownProjection, Float[Tensor, "d_model d_mlp"]]],
) -> Iterator[None]:
    """Other matrices in place of some down-projections inside the `with`; bit for bit as before behind it.

    Args:
        matrices: By layer, the down-projection and what stands in for its weights.
    """
    now = {layer: projection.read().detach().clone() for layer, (projection, _) in matrices.items()}

    def put(layer: int, matrix: Tensor) -> None:
        matrices[layer][0].restore(torch.arange(matrix.shape[1]), matrix)

    try:
        for layer, (_, matrix) in matrices.items():
            put(layer, matrix)
        yield
    finally:
        for layer, matrix in now.items():
            put(layer, matrix)
