"""What `layout` asks a model: which modules ran in a short forward pass, and what depends on what."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nmke.models.tracing import first_tensor, with_first_tensor

TOKENS = 6


@dataclass
class Call:
    """What a module saw and gave in one forward pass.

    Args:
        inputs: Tensors among its arguments that have one row per token.
        output: Its first output tensor; empty where it gave none.
        order: Its place among the recorded modules, by when they finished.
        count: How many times it ran.
    """

    inputs: list[Tensor] = field(default_factory=list)
    output: Tensor = field(default_factory=lambda: torch.empty(0))
    order: int = -1
    count: int = 0


def has_rows(tensor: Tensor) -> bool:
    """True for a floating-point tensor with one row per token of the probing pass."""
    return tensor.is_floating_point() and tensor.ndim >= 2 and tensor.numel() == TOKENS * tensor.shape[-1]


def rows(tensor: Tensor) -> Float[Tensor, "seq width"]:
    """The tensor as one row per token."""
    return tensor.reshape(TOKENS, tensor.shape[-1])


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside, each module's own mode back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def record_calls(modules: Mapping[str, nn.Module], *, isolate: bool = False) -> Iterator[dict[str, Call]]:
    """Record every module's call under its name; a module that did not run is absent.

    Args:
        modules: What to watch.
        isolate: Hand a copy of each output on, so that nothing recorded is changed in place later.

    Yields:
        A dictionary that fills during the forward pass.
    """
    calls: dict[str, Call] = {}
    finished = 0

    def watch(name: str, module: nn.Module) -> list[torch.utils.hooks.RemovableHandle]:
        def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            call = calls.setdefault(name, Call())
            call.count += 1
            values = (*args, *kwargs.values())
            call.inputs = [value for value in values if isinstance(value, Tensor) and has_rows(value)]

        def after(_module: nn.Module, _args: Any, output: Any) -> Any:
            nonlocal finished
            calls[name].order = finished
            finished += 1
            try:
                tensor = first_tensor(output)
            except TypeError:  # a module may return no tensor at all: then there is nothing to record
                return None
            calls[name].output = tensor
            return with_first_tensor(output, tensor.clone()) if isolate else None

        return [
            module.register_forward_pre_hook(before, with_kwargs=True),
            module.register_forward_hook(after),
        ]

    handles = [handle for name, module in modules.items() for handle in watch(name, module)]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def direction(like: Tensor) -> Float[Tensor, " width"]:
    """A fixed random direction as wide as the tensor, in its type and on its device."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(like.shape[-1], generator=generator).to(like)


def gradient(output: Tensor, source: Tensor, weights: Tensor) -> Float[Tensor, "seq width"] | None:
    """Derivative of <weights, output> in each row of `source`, or None where nothing depends on it.

    Args:
        output: Tensor with one row per token.
        source: Tensor with one row per token, recorded earlier in the same pass.
        weights: [seq width] cotangent on the output's rows.
    """
    if not (output.requires_grad and source.requires_grad):
        return None
    if output is source:
        return weights
    (found,) = torch.autograd.grad(rows(output), source, weights, retain_graph=True, allow_unused=True)
    return None if found is None else rows(found)


def at_row(tensor: Tensor, row: int) -> Float[Tensor, "seq width"]:
    """The cotangent that looks at one row of `tensor` in the fixed random direction."""
    weights = torch.zeros_like(rows(tensor))
    weights[row] = direction(tensor)
    return weights


def mixes_positions(output: Tensor, sources: list[Tensor]) -> bool:
    """True if the last row of `output` depends on an earlier row of any source.

    Exact: a position-wise map has derivative 0 there, attention has not.
    """
    if not has_rows(output):
        return True
    return any(bool(found[:-1].any()) for found in _last_row_gradients(output, sources))


def is_position_wise(output: Tensor, sources: list[Tensor]) -> bool:
    """True if the last row of `output` depends on the last row of the sources, and on no earlier one."""
    if not has_rows(output) or mixes_positions(output, sources):
        return False
    return any(bool(found[-1].any()) for found in _last_row_gradients(output, sources))


def _last_row_gradients(output: Tensor, sources: list[Tensor]) -> list[Float[Tensor, "seq width"]]:
    weights = at_row(output, TOKENS - 1)
    found = (gradient(output, source, weights) for source in sources)
    return [each for each in found if each is not None]


def close(found: Tensor, expected: Tensor, like: torch.dtype | None = None) -> bool:
    """Equal up to the rounding of the type they were computed in.

    Args:
        found: One of the two.
        expected: The other, which sets the size of what counts as rounding.
        like: The type that set the rounding; that of `found` unless told.
    """
    tolerance = 64 * torch.finfo(like or found.dtype).eps ** (2 / 3)
    return bool((found - expected).norm() <= min(tolerance, 0.1) * expected.norm())
