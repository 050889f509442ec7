"""Stabilisers: what a locate-then-edit method can add against collapse, by name in `EditConfig.stabilisers`.

Each is one small thing: other layers, another target value, another weight of the key memory, or a filter of the
finished update. The filters are pure functions of the update, the weights as they are and as they were loaded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from nmke.config import EditConfig
from nmke.editors.memory import KeyMemory
from nmke.editors.method import Method
from nmke.errors import ConfigError
from nmke.registry import Registry
from nmke.types import LayerUpdate

Weights = Float[Tensor, "d_model d_mlp"]


class Filter(Protocol):
    """Changes one layer's finished update."""

    def __call__(self, update: LayerUpdate, now: Weights, base: Weights) -> LayerUpdate:
        """The update to write instead.

        Args:
            update: What the solver found.
            now: The layer's weights before the write.
            base: The layer's weights as loaded.
        """
        ...


@dataclass(frozen=True)
class Stabiliser:
    """What a stabiliser changes.

    Args:
        defaults: Settings it brings along; what the user sets holds.
        filter: Applied to the finished update, in the order the stabilisers are named.
        history: Edits' worth of weight that the key memory gets at least; None leaves it alone.
        min_layers: Layers it needs.
        mixes_neurons: Whether its filter spreads an update over neurons that a mask would spare.
    """

    defaults: Mapping[str, Any] = field(default_factory=dict)
    filter: Filter | None = None
    history: int | None = None
    min_layers: int = 1
    mixes_neurons: bool = False


stabilisers: Registry[Stabiliser] = Registry("stabiliser")


def in_force(method: Method, config: EditConfig) -> tuple[str, ...]:
    """The stabilisers of a method and of the settings, in order."""
    return (*method.stabilisers, *config.stabilisers)


def check_stabilisers(method: Method, config: EditConfig, layers: Sequence[int]) -> None:
    """Raise unless the stabilisers go with the method and with each other.

    Raises:
        ConfigError: Names the one that does not fit.
    """
    if config.stabilisers and method.solver is None:
        raise ConfigError(
            f"stabiliser {config.stabilisers[0]!r} goes with locate-then-edit methods, {config.method!r} is none; "
            "drop it or choose another method"
        )
    names = in_force(method, config)
    for name in names:
        stabiliser = stabilisers.get(name)
        if names.count(name) > 1:
            raise ConfigError(
                f"stabiliser {name!r} is in force twice with method {config.method!r}; name it once"
            )
        if stabiliser.history is not None and not method.remembers:
            raise ConfigError(
                f"stabiliser {name!r} weighs the keys of earlier edits, method {config.method!r} keeps none; "
                "choose a method that remembers, such as 'memit-memory'"
            )
        if stabiliser.mixes_neurons and config.mask != "none":
            raise ConfigError(
                f"stabiliser {name!r} spreads an update over all neurons and mask {config.mask!r} keeps some; "
                "drop one of them"
            )
        if len(layers) < stabiliser.min_layers:
            raise ConfigError(
                f"stabiliser {name!r} needs {stabiliser.min_layers} layers, {len(layers)} asked; give more layers"
            )


def weighed(memory: KeyMemory, names: Sequence[str]) -> KeyMemory:
    """The key memory with the weight that the stabilisers give it."""
    for history in (stabilisers.get(name).history for name in names):
        if history is not None and memory.count:
            factor = max(1.0, history / memory.count)
            gram = None if memory.gram is None else memory.gram * factor
            memory = replace(memory, rows=memory.rows * math.sqrt(factor), gram=gram)
    return memory


def filtered(update: LayerUpdate, now: Weights, base: Weights, names: Sequence[str]) -> LayerUpdate:
    """The update behind the stabilisers' filters."""
    for apply in (stabilisers.get(name).filter for name in names):
        if apply is not None:
            update = apply(update, now, base)
    return update


def dense_update(update: LayerUpdate, delta: Weights) -> LayerUpdate:
    """The same layer's update with another, dense ΔW [d_model, d_mlp]."""
    identity = torch.eye(len(delta), dtype=torch.float32, device=delta.device)
    return replace(update, left=identity, right=delta.float().contiguous())


def principal_directions(
    weights: Weights, share: float
) -> tuple[Float[Tensor, "d_model kept"], Float[Tensor, "d_mlp kept"]]:
    """Left and right singular vectors of the largest singular values that hold `share` of the squared sum.

    Args:
        weights: The matrix; computed in float64.
        share: In (0, 1); as few directions as reach it.
    """
    matrix = weights.double()
    small = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    values, vectors = torch.linalg.eigh(small @ small.T)
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    energy = values.cumsum(0)
    kept = int((energy < share * energy[-1]).sum()) + 1
    near = vectors[:, :kept]
    far = (small.T @ near) / values[:kept].sqrt()
    return (near, far) if small is matrix else (far, near)
