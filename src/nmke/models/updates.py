"""Writes one layer's update into a model in memory, and takes it back bit for bit."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Int
from torch import Tensor

from nmke.errors import NumericsError
from nmke.models.layout import ModelLayout
from nmke.models.weights import DownProjection, NeuronMatrix
from nmke.types import Columns, LayerUpdate, MatrixPlace


def matrix_at(layout: ModelLayout, place: MatrixPlace) -> NeuronMatrix:
    """One of the model's MLP matrices, one column per neuron.

    Raises:
        LayoutError: If the layer has no such part.
    """
    return layout.layers[place.layer].matrix(place.part)


def written_places(update: LayerUpdate) -> dict[MatrixPlace, Int[Tensor, " touched"]]:
    """The matrices that an update writes, and which neurons' columns of each."""
    places: dict[MatrixPlace, Tensor] = {}
    if "down" not in update.replaced:
        places[MatrixPlace(update.layer)] = (update.right != 0).any(dim=0).nonzero().squeeze(1)
    for part, columns in update.replaced.items():
        places[MatrixPlace(update.layer, part)] = columns.index.long()
    return places


def write_update(layout: ModelLayout, update: LayerUpdate) -> dict[MatrixPlace, Columns]:
    """Write all of an update or nothing.

    Returns:
        What was overwritten, in the order of writing.

    Raises:
        NumericsError: If a weight is not finite after it; nothing is written then.
        LayoutError: If the layer has no such part.
    """
    before: dict[MatrixPlace, Columns] = {}
    try:
        for place, index in written_places(update).items():
            matrix = matrix_at(layout, place)
            before[place] = Columns(index.to(torch.int32).cpu(), matrix.columns(index))
            if place.part in update.replaced:
                _replace(matrix, update.replaced[place.part], place)
            else:
                DownProjection(layout.layers[place.layer].down_proj).add(update.left, update.right)
    except BaseException:
        put_back(layout, before)
        raise
    return before


def put_back(layout: ModelLayout, before: Mapping[MatrixPlace, Columns]) -> None:
    """Restore columns, bit for bit."""
    for place, columns in before.items():
        matrix_at(layout, place).restore(columns.index.long(), columns.values)


def _replace(matrix: NeuronMatrix, columns: Columns, place: MatrixPlace) -> None:
    if not bool(columns.values.isfinite().all()):
        raise NumericsError(
            f"new content of {len(columns.index)} columns of the {place.part}-projection of layer {place.layer} was "
            "given; found NaN or infinity; edit fewer facts at once or use float32"
        )
    matrix.restore(columns.index.long(), columns.values)
