"""What lives across the batches of a run: the keys of earlier edits, per layer, or what their MLPs are given.

Pure tensor code. Keys are kept as rows, so that undoing an edit drops its rows; once there are more rows
than neurons only their second moment is kept, so that cost and memory stay flat however long the run is.
A superseded edit's key is released: its row dropped, or taken off the second moment.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from nmke.types import Gram, Keys


@dataclass(frozen=True)
class KeyMemory:
    """Keys of all earlier edits of one layer.

    Args:
        rows: The latest keys, [edits, d_mlp], float32.
        gram: Sum of k kᵀ over older keys that are no longer kept as rows, [d_mlp, d_mlp] float64, or None.
        count: Number of keys in all.
    """

    rows: Keys
    gram: Gram | None = None
    count: int = 0

    @classmethod
    def empty(cls, d_mlp: int, device: torch.device | str = "cpu") -> KeyMemory:
        """A memory of nothing."""
        return cls(torch.zeros(0, d_mlp, device=device))

    def remember(self, keys: Keys) -> KeyMemory:
        """The memory with `keys` added."""
        rows = torch.cat([self.rows, keys.to(self.rows)])
        count = self.count + len(keys)
        if len(rows) <= rows.shape[1]:
            return replace(self, rows=rows, count=count)
        double = rows.double()
        gram = double.T @ double
        return KeyMemory(rows[:0], gram if self.gram is None else self.gram + gram, count)

    def release(self, keys: Keys) -> KeyMemory:
        """The memory without `keys`, each of which it was given before, bit for bit."""
        rows, gram = self.rows, self.gram
        for key in keys.to(rows):
            same = (rows == key).all(dim=1).nonzero().flatten()
            if len(same):
                rows = torch.cat([rows[: same[0]], rows[same[0] + 1 :]])
            elif gram is not None:
                gram = gram - torch.outer(key.double(), key.double())
            else:
                raise ValueError("a key that the memory never held was to be released")
        return KeyMemory(rows, gram, self.count - len(keys))

    def moment(self) -> Gram:
        """Sum of k kᵀ over every key, [d_mlp, d_mlp], float64."""
        double = self.rows.double()
        gram = double.T @ double
        return gram if self.gram is None else gram + self.gram

    def submatrix(self, index: Tensor) -> Gram:
        """`moment()[index][:, index]` without building the rest, float64."""
        part = self.rows[:, index].double()
        gram = part.T @ part
        return gram if self.gram is None else gram + self.gram[index][:, index]


@dataclass(frozen=True)
class SolverState:
    """Memories of all layers.

    Args:
        memories: Of keys, by layer.
        inputs: Of what an MLP is given at the edits' subjects, with a one behind it, [edits, d_model + 1], by layer.
    """

    memories: Mapping[int, KeyMemory] = field(default_factory=dict)
    inputs: Mapping[int, KeyMemory] = field(default_factory=dict)

    def memory(self, layer: int, d_mlp: int, device: torch.device | str = "cpu") -> KeyMemory:
        """The memory of `layer`, empty at first."""
        return self.memories.get(layer) or KeyMemory.empty(d_mlp, device)

    def remember(self, keys: Mapping[int, Keys], inputs: Mapping[int, Keys] | None = None) -> SolverState:
        """The state with each layer's rows added."""
        return SolverState(_remember(self.memories, keys), _remember(self.inputs, inputs or {}))

    def release(self, keys: Mapping[int, Keys], inputs: Mapping[int, Keys] | None = None) -> SolverState:
        """The state without these rows of each layer; see `KeyMemory.release`."""
        return SolverState(_release(self.memories, keys), _release(self.inputs, inputs or {}))


def _remember(memories: Mapping[int, KeyMemory], added: Mapping[int, Keys]) -> dict[int, KeyMemory]:
    found = dict(memories)
    for layer, rows in added.items():
        found[layer] = (found.get(layer) or KeyMemory.empty(rows.shape[1], rows.device)).remember(rows)
    return found


def _release(memories: Mapping[int, KeyMemory], taken: Mapping[int, Keys]) -> dict[int, KeyMemory]:
    return {**memories, **{layer: memories[layer].release(rows) for layer, rows in taken.items()}}
