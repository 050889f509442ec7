"""What other processes were told of a model's down-projections, so that only what changed since is sent.

A matrix is looked at again only when torch's own write counter of it has moved.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from nmke.models.weights import DownProjection, written_matrix


@dataclass(frozen=True)
class Columns:
    """Columns of one down-projection: their indices and content, on the CPU."""

    index: Tensor
    content: Tensor


def all_columns(matrix: Tensor) -> Columns:
    """The whole matrix."""
    return Columns(torch.arange(matrix.shape[1]), matrix.cpu())


@dataclass
class Mirror:
    """One model's state in the eyes of its followers; a copy of the model starts anew.

    Args:
        loaded: Write counter of each layer's down-projection when the model was loaded; () for a copy.
        name: Tells it from the mirror of any other model.
        sent: By layer, the counter and the content that followers know.
    """

    loaded: tuple[int, ...] = ()
    name: str = field(default_factory=lambda: uuid.uuid4().hex)
    sent: dict[int, tuple[int, Tensor]] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, modules: Sequence[nn.Module]) -> Mirror:
        """The mirror of a model just loaded."""
        return cls(tuple(written_matrix(module)._version for module in modules))

    def __deepcopy__(self, memo: object) -> Mirror:
        return Mirror()

    def changes(self, modules: Sequence[nn.Module], unedited: Mapping[int, Tensor]) -> dict[int, Columns]:
        """What was written since the last call, at first since the model was loaded; remembered as sent.

        Args:
            modules: Every layer's down-projection.
            unedited: Down-projections as loaded, of layers that were edited since.
        """
        found: dict[int, Columns] = {}
        for layer, module in enumerate(modules):
            now = DownProjection(module).read()
            version, before = self.sent.get(layer, (self._loaded_version(layer), unedited.get(layer)))
            if now._version == version:
                continue
            if before is None:
                found[layer] = all_columns(now)
            else:
                index = (now != before).any(dim=0).nonzero().squeeze(1)
                found[layer] = Columns(index.cpu(), now[:, index].cpu())
            self.sent[layer] = (now._version, now.clone())
        return found

    def _loaded_version(self, layer: int) -> int:
        return self.loaded[layer] if layer < len(self.loaded) else -1
