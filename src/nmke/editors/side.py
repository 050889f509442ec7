"""Side memory: what a method keeps beside the weights, and how it takes part in inference.

Most methods are updates of down-projection columns. Three kinds of method are not: GRACE, WISE and MEMOIR look
something up while the model runs, IKE puts text in front of the prompt, and UltraEdit carries statistics from
batch to batch. All of them keep named tensors, and everything a session promises about weights holds for these:

- A batch computes the new memory and touches nothing (`BatchResult.side`); the session alone commits it. Nothing is
  recalled while it computes.
- The memory goes into the head file as `side/KIND/NAME`, and into each batch file as a before-image (`RowChanges`:
  only the rows that the batch changed), so that undo restores it bit for bit. What inference looks up is part of the
  content hash, so that a replay of the ledger gives equal hashes; what is only carried along is covered, as every
  file, by the hashes of files in the ledger.
- A kind whose method has a `Recall` is active while the session is open: the recall is a context manager, entered
  when the memory is installed and left when it is replaced, undone, swapped out by `session.base()`, or when the
  session is closed. Hooks live in it and nowhere else; no module is replaced and no method patched.
- A recall decides token by token, from what the model sees at that token and before it. So teacher forcing,
  greedy decoding with a key-value cache, padding and any batch give the same answer.
- A run whose memory is being recalled goes on with the same method only; formats that hold weights alone refuse
  to export it.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from nmke.models.load import EditableModel

PREFIX = "side/"


@dataclass(frozen=True)
class SideMemory:
    """The tensors that one method keeps.

    Args:
        kind: The method's registered name.
        tensors: By name; a method never drops a name once it is there.
    """

    kind: str
    tensors: Mapping[str, Tensor]

    def flat(self) -> dict[str, Tensor]:
        """The tensors by the names they have in files."""
        return {f"{PREFIX}{self.kind}/{name}": tensor for name, tensor in self.tensors.items()}


class Recall(Protocol):
    """How a side memory takes part in inference."""

    def __call__(self, model: EditableModel, memory: SideMemory) -> AbstractContextManager[None]:
        """A context in which the model answers with the memory."""
        ...


@dataclass(frozen=True)
class RowChanges:
    """A tensor as it was, told by what differs from what it became.

    Args:
        length: Rows it had; -1 when it did not exist.
        index: Rows that differ, [changed] int64.
        rows: These rows as they were.
    """

    length: int
    index: Tensor
    rows: Tensor

    @classmethod
    def between(cls, before: Tensor | None, after: Tensor) -> RowChanges:
        """What leads from `after` back to `before`."""
        if before is None:
            return cls(-1, torch.zeros(0, dtype=torch.int64), after[:0])
        comparable = before.shape[1:] == after.shape[1:] and before.dtype == after.dtype
        if not comparable or len(before) > len(after):
            return cls(len(before), torch.arange(len(before)), before)
        differs = (_bits(before) != _bits(after[: len(before)])).flatten(1).any(dim=1)
        index = differs.nonzero().squeeze(1)
        return cls(len(before), index.cpu(), before[index])

    def undo(self, after: Tensor) -> Tensor | None:
        """The tensor as it was; None when it did not exist."""
        if self.length < 0:
            return None
        if len(self.rows) == self.length:
            return self.rows.to(after.device)
        before = after[: self.length].clone()
        before[self.index.to(after.device)] = self.rows.to(after.device)
        return before


def unflatten(tensors: Mapping[str, Tensor]) -> dict[str, SideMemory]:
    """Memories by kind, from the names that `SideMemory.flat` gives."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        kind, _, own = name.removeprefix(PREFIX).partition("/")
        found.setdefault(kind, {})[own] = tensor
    return {kind: SideMemory(kind, own) for kind, own in found.items()}


def _bits(tensor: Tensor) -> Tensor:
    """The tensor's bytes along a new last axis, so that -0.0 and 0.0 are two things."""
    return tensor.contiguous().unsqueeze(-1).view(torch.uint8)
