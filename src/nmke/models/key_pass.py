"""Run rows of tokens through the edited layers again and again while these are being written.

`SharedPass` runs what rows have in common at their beginning once, keeps the states that the first edited layer
receives, and starts each later run at the layer that was written last. `WholePass` does the same by plain forward
passes over whole rows: the slow twin, and the way out for a model whose blocks cannot be replayed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from nmke.models.load import EditableModel
from nmke.models.prefix import AnchoredRows, FrozenPrefixLayer, LatestLayer, common_heads, tail_inputs
from nmke.models.replay import BlockReplay
from nmke.models.tokens import pad_batch
from nmke.models.tracing import record_inputs, stop_after


class WholePass:
    """Forward passes over whole rows up to the last edited layer.

    Args:
        model: The model; the weights of edited layers may change between runs, earlier ones may not.
        ids: Token ids of each row.
        layers: The edited layers, ascending.

    Attributes:
        columns: Of each row's last token, in what the modules see.
    """

    def __init__(self, model: EditableModel, ids: Sequence[tuple[int, ...]], layers: Sequence[int]) -> None:
        self._model, self._last = model, layers[-1]
        self._batch = pad_batch([list(row) for row in ids], model.encoder.pad_id, device=model.device)
        self.columns = torch.tensor([len(row) - 1 for row in ids], device=model.device)

    def prepare(self, start: int) -> None:
        """Nothing is kept between runs."""

    def run(self, start: int) -> None:
        """Run every layer to the last edited one."""
        with stop_after(self._model.layout.layers[self._last].block):
            self._model.model(**self._model.inputs(self._batch))


class SharedPass:
    """The same with beginnings shared and nothing run that cannot have changed; see `WholePass`."""

    def __init__(self, model: EditableModel, ids: Sequence[tuple[int, ...]], layers: Sequence[int]) -> None:
        heads = common_heads(ids)
        distinct = sorted({head for head in heads if head})
        self._model, self._layers = model, tuple(layers)
        rows = AnchoredRows(tuple(ids), tuple(len(head) for head in heads))
        self._heads = _Blocks(model, layers)
        self._tails = _Blocks(model, layers)
        self._place = torch.tensor([distinct.index(h) if h else 0 for h in heads], device=model.device)
        self._caches: list[LatestLayer] = []
        self._frozen: list[FrozenPrefixLayer] = []
        if distinct:
            self._run_heads(distinct)
        prefix = Cache(layers=list(self._frozen)) if self._frozen else None
        self._inputs = tail_inputs(model, rows, prefix)
        self.columns = torch.tensor(rows.tail_lengths, device=model.device) - 1

    def prepare(self, start: int) -> None:
        """Bring the beginnings up to the weights as they are; nothing to do before the first run."""
        if not (self._tails.recorded and self._frozen):
            return
        self._heads.run(start)
        for layer in range(start, self._layers[-1] + 1):
            self._freeze(layer)

    def run(self, start: int) -> None:
        """Run the layers from `start`; the first time all of them, wherever it is asked to start."""
        if self._tails.recorded:
            self._tails.run(start)
        else:
            self._tails.record(self._inputs)

    def _run_heads(self, distinct: Sequence[tuple[int, ...]]) -> None:
        model = self._model
        batch = pad_batch([list(head) for head in distinct], model.encoder.pad_id, "left", model.device)
        self._caches = [LatestLayer() for _ in model.layout.layers]
        cache = Cache(layers=list(self._caches))
        self._heads.record({**model.inputs(batch), "past_key_values": cache, "use_cache": True})
        for layer in range(self._layers[-1] + 1):
            self._frozen.append(FrozenPrefixLayer(*self._states(layer)))

    def _freeze(self, layer: int) -> None:
        frozen = self._frozen[layer]
        frozen.keys, frozen.values = self._states(layer)

    def _states(self, layer: int) -> tuple[Tensor, Tensor]:
        latest = self._caches[layer]
        return latest.keys[self._place], latest.values[self._place]


class _Blocks:
    """One batch's way through the edited layers, recorded once, and what each of them received last."""

    def __init__(self, model: EditableModel, layers: Sequence[int]) -> None:
        self._model, self._first, self._last = model, layers[0], layers[-1]
        self._replay: BlockReplay | None = None
        self._hidden: dict[int, Tensor] = {}

    @property
    def recorded(self) -> bool:
        """Whether the batch has been run."""
        return self._replay is not None

    def record(self, inputs: dict[str, object]) -> None:
        """Run the batch from the beginning to the last edited layer."""
        edited = range(self._first, self._last + 1)
        with record_inputs({i: self._model.layout.layers[i].block for i in edited}) as seen:
            self._replay = BlockReplay.record(self._model, inputs, self._first, self._last)
        self._hidden = {i: seen[i].clone() for i in edited}

    @torch.no_grad()
    def run(self, start: int) -> None:
        """Run the blocks from `start` to the last edited one, keeping what each of them receives."""
        assert self._replay is not None
        hidden = self._hidden[start]
        for layer in range(start, self._last + 1):
            self._hidden[layer] = hidden
            hidden = self._replay.run_block(layer, hidden)
