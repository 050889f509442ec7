"""The side memories of a session's model: installed, recalled while it runs, hashed and taken back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from nmke.editors import methods
from nmke.editors.side import RowChanges, SideMemory, unflatten
from nmke.models.load import EditableModel
from nmke.models.tokens import pad_batch


class SideState:
    """Owner of what methods keep beside the weights; see `nmke.editors.side` for the design.

    Args:
        model: The session's model. An earlier session's recall on it is ended.
    """

    def __init__(self, model: EditableModel) -> None:
        self._model = model
        self._memories: dict[str, SideMemory] = {}
        self._active, self._on = model.recalls, False
        self._active.close()

    @property
    def memories(self) -> Mapping[str, SideMemory]:
        """The memories by kind."""
        return dict(self._memories)

    @property
    def recalled(self) -> tuple[str, ...]:
        """The kinds that take part in inference."""
        return tuple(kind for kind in sorted(self._memories) if methods.get(kind).recall is not None)

    def tensors(self, *, recalled: bool = False) -> dict[str, Tensor]:
        """Every tensor by its name in files, or only of kinds that are recalled; not cloned."""
        kinds = self.recalled if recalled else tuple(self._memories)
        return {name: tensor for kind in kinds for name, tensor in self._memories[kind].flat().items()}

    def install(self, memories: Mapping[str, SideMemory]) -> None:
        """Replace every memory; nothing is recalled of the old ones."""
        self.close()
        self._memories = dict(memories)
        self._recall()

    def try_recall(self) -> None:
        """Let the model read one word with its memories, so that one that does not fit shows at once."""
        if self.recalled:
            batch = pad_batch(
                [self._model.encoder.encode("The")], self._model.encoder.pad_id, device=self._model.device
            )
            with torch.inference_mode():
                self._model.model(**self._model.inputs(batch))

    def commit(self, memory: SideMemory) -> dict[str, RowChanges]:
        """Replace the memory of one kind.

        Returns:
            What leads back, by the tensors' names in files.
        """
        before, after = self.tensors(), memory.flat()
        self.install({**self._memories, memory.kind: memory})
        return {
            name: RowChanges.between(before.get(name), tensor)
            for name, tensor in after.items()
            if tensor is not before.get(name)
        }

    def take_back(self, changes: Mapping[str, RowChanges]) -> None:
        """Undo a `commit`, bit for bit."""
        tensors = self.tensors()
        for name, change in changes.items():
            before = change.undo(tensors.pop(name))
            if before is not None:
                tensors[name] = before
        self.install(unflatten(tensors))

    @contextmanager
    def off(self) -> Iterator[None]:
        """Nothing is recalled inside the `with`."""
        was_on = self._on
        self.close()
        try:
            yield
        finally:
            if was_on:
                self._recall()

    def close(self) -> None:
        """Recall nothing any more; the memories stay known."""
        self._on = False
        self._active.close()

    def _recall(self) -> None:
        with ExitStack() as stack:
            for kind in self.recalled:
                recall = methods.get(kind).recall
                assert recall is not None
                stack.enter_context(recall(self._model, self._memories[kind]))
            self._active.push(stack.pop_all())
        self._on = True
