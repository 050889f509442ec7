"""Silence neurons: their columns read zero inside a context, and come back bit for bit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from nmke.models.load import EditableModel
from nmke.models.weights import DownProjection
from nmke.types import Mask


@contextmanager
def silenced(model: EditableModel, neurons: Mapping[int, Mask]) -> Iterator[None]:
    """The model without what these neurons write, at every token.

    Args:
        model: The model; its weights change inside the context and are restored exactly.
        neurons: Per layer, which to silence, [d_mlp].
    """
    before = []
    for layer, mask in neurons.items():
        projection = DownProjection(model.layout.layers[layer].down_proj)
        index = mask.nonzero().flatten()
        before.append((projection, index, projection.columns(index)))
    try:
        for projection, index, columns in before:
            projection.restore(index, columns * 0)
        yield
    finally:
        for projection, index, columns in before:
            projection.restore(index, columns)
