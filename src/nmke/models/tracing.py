"""Context managers over a model's modules: record inputs and outputs, replace an output, stop early.

Hooks live only inside the `with`. Values are taken as the module passes them: a tensor, or the first
tensor of a tuple, list or dict-like output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


class StopForward(Exception):
    """Raised by a hook to end a forward pass early; caught by `stop_after`."""


def first_tensor(value: Any) -> Tensor:
    """The tensor itself, or the first tensor inside a tuple, list or mapping.

    Raises:
        TypeError: If there is no tensor in it.
    """
    if isinstance(value, Tensor):
        return value
    items = value.values() if isinstance(value, Mapping) else value
    if isinstance(value, (tuple, list, Mapping)):
        for item in items:
            if isinstance(item, Tensor):
                return item
    raise TypeError(f"no tensor in a module output of type {type(value).__name__}")


def with_first_tensor(value: Any, tensor: Tensor) -> Any:
    """`value` with its first tensor replaced by `tensor`."""
    if isinstance(value, Tensor):
        return tensor
    if isinstance(value, tuple):
        position = next(i for i, item in enumerate(value) if isinstance(item, Tensor))
        return (*value[:position], tensor, *value[position + 1 :])
    if isinstance(value, list):
        position = next(i for i, item in enumerate(value) if isinstance(item, Tensor))
        return [*value[:position], tensor, *value[position + 1 :]]
    name = next(k for k, item in value.items() if isinstance(item, Tensor))
    value[name] = tensor
    return value


@contextmanager
def record_inputs(modules: Mapping[Any, nn.Module]) -> Iterator[dict[Any, Tensor]]:
    """Collect each module's first positional input, under the mapping's own keys.

    Yields:
        A dictionary that fills during the forward pass; tensors are not cloned.
    """
    seen: dict[Any, Tensor] = {}

    def hook_for(key: Any) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen[key] = args[0] if args else first_tensor(kwargs)

        return hook

    handles = [m.register_forward_pre_hook(hook_for(key), with_kwargs=True) for key, m in modules.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def record_outputs(modules: Mapping[Any, nn.Module], *, clone: bool = False) -> Iterator[dict[Any, Tensor]]:
    """Collect each module's output tensor, under the mapping's own keys.

    Args:
        modules: Which modules to watch.
        clone: Copy each output; needed when a later module adds to it in place.
    """
    seen: dict[Any, Tensor] = {}

    def hook_for(key: Any) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            tensor = first_tensor(output)
            seen[key] = tensor.clone() if clone else tensor

        return hook

    handles = [m.register_forward_hook(hook_for(key)) for key, m in modules.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def replace_output(module: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Pass the module's output tensor through `change` while the context is open."""

    def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
        return with_first_tensor(output, change(first_tensor(output)))

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def stop_after(module: nn.Module) -> Iterator[None]:
    """End any forward pass inside the context as soon as `module` has run."""

    def hook(_module: nn.Module, _args: Any, _output: Any) -> None:
        raise StopForward

    handle = module.register_forward_hook(hook)
    try:
        yield
    except StopForward:
        return
    finally:
        handle.remove()


@contextmanager
def contiguous_input(module: nn.Module) -> Iterator[None]:
    """Give the module a contiguous input while the context is open.

    A linear layer on a strided slice of [batch, seq, d] multiplies batch by batch and may copy its weight for
    each row: the unembedding of 128 prompts' last tokens took 77 s in bfloat16, 0.1 s when contiguous.
    """

    def hook(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0].contiguous(), *args[1:])

    handle = module.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()
