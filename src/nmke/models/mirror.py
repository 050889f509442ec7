"""What other processes were told of a model's MLP matrices, so that only what changed since is sent.

A matrix is looked at again only when torch's own write counter of it has moved.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from nmke.models.blocks import LayerParts
from nmke.models.weights import written_matrix
from nmke.types import Columns, MatrixPlace


def all_columns(matrix: Tensor) -> Columns:
    """The whole matrix, on the CPU."""
    return Columns(torch.arange(matrix.shape[1]), matrix.cpu())


@dataclass
class Mirror:
    """One model's state in the eyes of its followers; a copy of the model starts anew.

    Args:
        loaded: Write counter of each layer's down-projection when the model was loaded; () for a copy.
        name: Tells it from the mirror of any other model.
        sent: By matrix, the counter and the content that followers know.
    """

    loaded: tuple[int, ...] = ()
    name: str = field(default_factory=lambda: uuid.uuid4().hex)
    sent: dict[MatrixPlace, tuple[int, Tensor]] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, modules: Sequence[nn.Module]) -> Mirror:
        """The mirror of a model just loaded."""
        return cls(tuple(written_matrix(module)._version for module in modules))

    def __deepcopy__(self, memo: object) -> Mirror:
        return Mirror()

    def changes(
        self, layers: Sequence[LayerParts], unedited: Mapping[MatrixPlace, Tensor]
    ) -> dict[MatrixPlace, Columns]:
        """What was written since the last call, at first since the model was loaded; remembered as sent.

        Every down-projection is watched, and the other matrices from the first time that a session wrote them.

        Args:
            layers: The decoder layers.
            unedited: Matrices as loaded, of those that were edited since.
        """
        found: dict[MatrixPlace, Columns] = {}
        down = [MatrixPlace(layer) for layer in range(len(layers))]
        for place in [*down, *(place for place in unedited if place.part != "down")]:
            matrix = layers[place.layer].matrix(place.part)
            now, counter = matrix.read(), matrix.version
            version, before = self.sent.get(place, (self._loaded_version(place), unedited.get(place)))
            if counter == version:
                continue
            if before is None:
                found[place] = all_columns(now)
            else:
                index = (now != before).any(dim=0).nonzero().squeeze(1)
                found[place] = Columns(index.cpu(), now[:, index].cpu())
            self.sent[place] = (counter, now.clone())
        return found

    def _loaded_version(self, place: MatrixPlace) -> int:
        known = place.part == "down" and place.layer < len(self.loaded)
        return self.loaded[place.layer] if known else -1
