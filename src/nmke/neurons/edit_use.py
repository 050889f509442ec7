"""Which neurons one edit used: how much of what it wrote each of them carries, and what they said before and after."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from nmke.batch_file import LayerWrite
from nmke.errors import RequestError


@dataclass(frozen=True)
class UsedNeuron:
    """One neuron that carries a part of an edit.

    Args:
        layer, neuron: Which one.
        carries: Its part of what the layer writes for the edit at its key; the parts of a layer add up to 1.
        coefficient: Its coefficient in the edit's key.
        change: ‖new column - old column‖ / ‖old column‖, by the whole batch.
        cosine: Between old and new column.
        before, after: The column, [d_model].
    """

    layer: int
    neuron: int
    carries: float
    coefficient: float
    change: float
    cosine: float
    before: Float[Tensor, " d_model"]
    after: Float[Tensor, " d_model"]


@dataclass(frozen=True)
class LayerUse:
    """What one edit did to one layer.

    Args:
        layer: Which one.
        d_mlp: Its neurons.
        allowed: How many of them the mask let change; all without a mask.
        for_half, for_most: Fewest neurons whose parts, the largest first, add up to 50 % and 90 % of it.
        written: Length of what the layer writes for the edit at its key.
        share: ‖the edit's own part of ΔW‖ / ‖the batch's ΔW‖.
        top: The neurons that carry most, in order.
    """

    layer: int
    d_mlp: int
    allowed: int
    for_half: int
    for_most: int
    written: float
    share: float
    top: tuple[UsedNeuron, ...]


def edit_use(writes: Mapping[int, LayerWrite], edit: int, count: int = 5) -> list[LayerUse]:
    """The neurons of each edited layer that one edit used.

    Args:
        writes: What its batch wrote.
        edit: The edit, counted among those the batch wrote.
        count: Neurons per layer.

    Raises:
        RequestError: If the batch wrote fewer edits.
    """
    return [_layer_use(layer, write, edit, count) for layer, write in writes.items()]


def _layer_use(layer: int, write: LayerWrite, edit: int, count: int) -> LayerUse:
    rows = (write.owners == edit).nonzero().flatten()
    if len(rows) == 0:
        raise RequestError(f"the batch wrote no edit number {edit}; it wrote {int(write.owners.max()) + 1}")
    key = write.keys[rows[0]].double()
    delta = write.delta
    wrote = delta @ key
    parts = key * (delta.T @ wrote) / wrote.square().sum().clamp(min=1e-30)  # add up to 1
    own = write.of_edit(edit)
    ranked = parts.argsort(descending=True, stable=True)
    sums = parts[ranked].cumsum(0)
    place = {int(neuron): column for column, neuron in enumerate(write.before.index.tolist())}
    named = [int(i) for i in ranked if int(i) in place][:count]
    return LayerUse(
        layer,
        len(key),
        len(key) if write.mask is None else int(write.mask.sum()),
        int((sums < 0.5).sum()) + 1,
        int((sums < 0.9).sum()) + 1,
        float(wrote.norm()),
        float(own.norm() / delta.norm().clamp(min=1e-30)),
        tuple(_used(layer, i, parts, key, delta, write.before.values[:, place[i]].double()) for i in named),
    )


def _used(layer: int, neuron: int, parts: Tensor, key: Tensor, delta: Tensor, before: Tensor) -> UsedNeuron:
    after = before + delta[:, neuron]
    return UsedNeuron(
        layer,
        neuron,
        float(parts[neuron]),
        float(key[neuron]),
        float((after - before).norm() / before.norm().clamp(min=1e-30)),
        float(torch.cosine_similarity(before, after, dim=0)),
        before,
        after,
    )
