"""Run the blocks up to a layer once, then replay only those behind it.

What a decoder block is called with (masks, positions, rotary tables) is recorded during one ordinary
forward pass, so a replay asks nothing of the architecture. `TailReplay` goes further: every token before
the anchor (the subject's last token) is unaffected by what is added at the anchor, so their keys and
values are kept in a frozen cache and only the tail is run again. `WholeForward` gives the same numbers
by plain full forward passes; it is the slow twin in tests and the way out for a model whose blocks
cannot be replayed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from nmke.models.layout import ModelLayout
from nmke.models.load import EditableModel
from nmke.models.packed import Packing, UnpackableError, attention_configs
from nmke.models.prefix import (
    AnchoredRows,
    FrozenPrefixLayer,
    States,
    prefix_states,
    select_states,
    tail_inputs,
)
from nmke.models.tokens import pad_batch
from nmke.models.tracing import first_tensor, record_inputs, replace_output, stop_after

Site = Literal["block", "down_proj"]


@dataclass(frozen=True)
class BlockReplay:
    """Recorded calls of the blocks from `first` on, ready to be run again on other hidden states.

    Args:
        layout: The model's parts.
        first: Index of the first block that can be replayed.
        hidden: What block `first` received, [batch, seq, d_model].
        calls: For each block from `first` on, its other positional and keyword arguments.
    """

    layout: ModelLayout
    first: int
    hidden: Tensor
    calls: tuple[tuple[tuple[Any, ...], dict[str, Any]], ...]

    @classmethod
    def record(
        cls,
        model: EditableModel,
        inputs: Mapping[str, Any],
        first: int,
        last: int | None = None,
        through_norm: bool = False,
        in_full: int | None = None,
    ) -> BlockReplay:
        """Run one forward pass without gradients and keep what the blocks `first`..`last` were called with.

        The pass ends behind block `last`, or behind the final norm with `through_norm`.

        Args:
            model: The model.
            inputs: Of its forward pass.
            first: First block to record.
            last: Last one; None: the model's last.
            through_norm: See above.
            in_full: The last block whose output is wanted: those behind it run on the first row alone, only to
                see what they are called with. None: all are.
        """
        blocks = [parts.block for parts in model.layout.layers]
        last = len(blocks) - 1 if last is None else last
        seen: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        start: list[Tensor] = []
        rows = len(inputs["input_ids"])

        def hook_for(index: int) -> Any:
            def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
                hidden, rest, named = _split_hidden(args, kwargs)
                if index == first:
                    start.append(hidden.clone())
                seen[index] = (rest, named)
                if in_full is None or index <= in_full:
                    return None
                return _first_row(hidden, rest, named, rows)

            return hook

        with ExitStack() as stack:
            for index in range(first, last + 1):
                handle = blocks[index].register_forward_pre_hook(hook_for(index), with_kwargs=True)
                stack.callback(handle.remove)
            stack.enter_context(torch.no_grad())
            stack.enter_context(stop_after(model.layout.final_norm if through_norm else blocks[last]))
            model.model(**inputs)
        return cls(model.layout, first, start[0], tuple(seen[i] for i in range(first, last + 1)))

    def select(self, rows: Tensor, cache: Cache | None) -> BlockReplay | None:
        """The same for a part of the rows, by their indices, without running anything.

        Args:
            rows: Which ones.
            cache: What stands in for the cache that the blocks were called with.

        Returns:
            None where a block was called with something that is not by row, such as biases by row and head.
        """
        pick = _RowPicker(rows, len(self.hidden), cache)
        calls = tuple((pick(args), pick(kwargs)) for args, kwargs in self.calls)
        return None if pick.failed else replace(self, hidden=self.hidden[rows], calls=calls)

    def run(self, hidden: Tensor, last: int | None = None) -> Tensor:
        """The output of block `last` (default: of the last recorded one) for `hidden` [batch, seq, d_model]."""
        stop = len(self.calls) if last is None else last - self.first + 1
        for layer in range(self.first, self.first + stop):
            hidden = self.run_block(layer, hidden)
        return hidden

    def run_block(self, layer: int, hidden: Tensor) -> Tensor:
        """The output of one block for its own input [batch, seq, d_model]."""
        args, kwargs = self.calls[layer - self.first]
        return first_tensor(self.layout.layers[layer].block(hidden, *args, **kwargs))


class _RowPicker:
    """Takes some rows out of everything that a block was called with; the same tensor gives the same result."""

    def __init__(self, rows: Tensor, of: int, cache: Cache | None) -> None:
        self._rows, self._of, self._cache = rows, of, cache
        self._done: dict[int, Tensor] = {}
        self.failed = False

    def __call__(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            if id(value) not in self._done:
                self._done[id(value)] = self._picked(value)
            return self._done[id(value)]
        if isinstance(value, Cache):
            return self._cache
        if isinstance(value, dict):
            return {name: self(item) for name, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self(item) for item in value)
        return value

    def _picked(self, tensor: Tensor) -> Tensor:
        if tensor.ndim < 2 or len(tensor) == 1:  # positions in the row, or the same for every row
            return tensor
        if len(tensor) != self._of:
            self.failed = True
            return tensor
        return tensor[self._rows]


def _first_row(
    hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], rows: int
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """A block's call for its first row alone; None where the rows cannot be told apart."""
    cache = next((v for v in (*args, *kwargs.values()) if isinstance(v, Cache)), None)
    first = None if cache is None else _frozen([(c.keys[:1], c.values[:1]) for c in cache.layers])
    pick = _RowPicker(torch.zeros(1, dtype=torch.long, device=hidden.device), rows, first)
    call = ((hidden[:1], *pick(args)), pick(kwargs))
    return None if pick.failed else call


def _split_hidden(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    if args:
        return args[0], args[1:], dict(kwargs)
    named = dict(kwargs)
    return named.pop("hidden_states"), (), named


@runtime_checkable
class Replay(Protocol):
    """Final hidden states of the tail when vectors are added at the anchor."""

    anchors: dict[int, Tensor]

    def run(self, deltas: Mapping[int, Tensor]) -> Tensor:
        """Hidden states before the final norm, [rows, tail, d_model].

        Args:
            deltas: Per layer, what is added at the anchors, [rows, d_model], or to every token of the tails,
                [rows, tail, d_model].
        """
        ...

    def select(self, rows: Sequence[int]) -> Replay:
        """The same for a part of the rows."""
        ...


class TailReplay:
    """Replay of the tail behind a frozen prefix.

    Args:
        model: The model; its weights must not change while the replay is in use.
        rows: Token rows with their anchors.
        layers: The layers that receive a delta.
        site: Where it is added: the block's output or the down-projection's output.
        layout: Blocks to replay in place of the model's own, such as those of `with_half_products`.

    The anchor stands in column 0 of the tail. `anchors` holds what stood at each site before any delta. The tails
    run packed, see `nmke.models.packed`, where the model's blocks can.
    """

    def __init__(
        self,
        model: EditableModel,
        rows: AnchoredRows,
        layers: Sequence[int],
        site: Site,
        layout: ModelLayout | None = None,
    ) -> None:
        self.model, self.rows, self.layers, self.site = model, rows, tuple(layers), site
        self._layout = layout or model.layout
        self._prefix = prefix_states(model, rows)
        self._record()
        self._packed = None if model.packable is False else _PackedTail.of(self._replay, rows, self._prefix)

    def _record(self) -> None:
        model, rows = self.model, self.rows
        first = first_replayed(self.layers, self.site)
        inputs = tail_inputs(model, rows, _frozen(self._prefix))
        modules = (
            {i: model.layout.layers[i].down_proj for i in self.layers} if self.site == "down_proj" else {}
        )
        first_columns = torch.zeros(len(rows.ids), dtype=torch.long, device=model.device)
        with _record_columns(modules, first_columns) as seen:
            recorded = BlockReplay.record(model, inputs, first, in_full=self.layers[-1])
        self._replay = replace(recorded, layout=self._layout)
        if self.site == "block":
            seen = {self.layers[0]: self._replay.hidden[:, 0].clone()}
        self.anchors = seen

    def run(self, deltas: Mapping[int, Tensor]) -> Tensor:
        """See `Replay.run`."""
        replay, add = self._replay, _add_at_first  # of padded rows
        with ExitStack() as stack:
            if self._packed is not None:
                replay, add = self._packed.replay, self._packed.packing.added
                stack.enter_context(self._packed.packing.attention(self._packed.configs))
            hidden = replay.hidden
            if self.site == "block":
                hidden = add(hidden, deltas[self.layers[0]])
            else:
                for layer, delta in deltas.items():
                    module = self._layout.layers[layer].down_proj
                    stack.enter_context(replace_output(module, partial(add, delta=delta)))
            found = replay.run(hidden).to(self.model.device)  # a spread model's last layer is elsewhere
        return found if self._packed is None else self._packed.packing.unpack(found)

    def select(self, rows: Sequence[int]) -> TailReplay:
        """See `Replay.select`."""
        part = object.__new__(TailReplay)
        part.model, part.layers, part.site = self.model, self.layers, self.site
        part._layout = self._layout
        part.rows = self.rows.select(rows)
        index = torch.tensor(list(rows), device=self.model.device)
        part._prefix = [(keys[index], values[index]) for keys, values in self._prefix]
        replay = self._replay.select(index, _frozen(part._prefix))
        if replay is None:
            part._prefix = select_states(self._prefix, rows, max(part.rows.anchors))
            part._record()
        else:
            part._replay, part.anchors = replay, {i: a[index] for i, a in self.anchors.items()}
        part._packed = None if self._packed is None else _PackedTail.of(part._replay, part.rows, part._prefix)
        return part


@dataclass(frozen=True)
class _PackedTail:
    """The same replay without padding.

    Args:
        packing: Where the tokens stand.
        replay: Blocks and their calls for [1, tokens, d_model].
        configs: Of the blocks' attention.
    """

    packing: Packing
    replay: BlockReplay
    configs: list[Any]

    @classmethod
    def of(cls, replay: BlockReplay, rows: AnchoredRows, prefix: States) -> _PackedTail | None:
        """None where the blocks cannot run packed."""
        packing = Packing(rows.tail_lengths, prefix, replay.first, replay.hidden.device)
        configs = attention_configs([parts.block for parts in replay.layout.layers[replay.first :]])
        try:
            with packing.attention(configs):
                calls = packing.calls(replay.calls)
        except UnpackableError:
            return None
        return cls(packing, replace(replay, hidden=packing.pack(replay.hidden), calls=calls), configs)


def _frozen(states: States) -> Cache | None:
    return Cache(layers=[FrozenPrefixLayer(keys, values) for keys, values in states]) if states else None


class WholeForward:
    """The same as `TailReplay` by full forward passes, nothing kept between them."""

    def __init__(self, model: EditableModel, rows: AnchoredRows, layers: Sequence[int], site: Site) -> None:
        self.model, self.rows, self.layers, self.site = model, rows, tuple(layers), site
        self._batch = pad_batch([list(ids) for ids in rows.ids], model.encoder.pad_id, device=model.device)
        self._columns = torch.tensor(rows.anchors, device=model.device)
        self.anchors: dict[int, Tensor] = {}
        modules = {i: self._module(i) for i in self.layers}
        with _record_columns(modules, self._columns) as seen, torch.no_grad():
            model.model(**model.inputs(self._batch))
        self.anchors = seen

    def _module(self, layer: int) -> nn.Module:
        parts = self.model.layout.layers[layer]
        return parts.block if self.site == "block" else parts.down_proj

    def run(self, deltas: Mapping[int, Tensor]) -> Tensor:
        """See `Replay.run`."""
        finals: dict[str, Tensor] = {}
        with ExitStack() as stack:
            for layer, delta in deltas.items():
                change = _adder(self._columns, delta)
                stack.enter_context(replace_output(self._module(layer), change))
            finals = stack.enter_context(record_inputs({"norm": self.model.layout.final_norm}))
            self.model.model(**self.model.inputs(self._batch))
        tail = max(self.rows.tail_lengths)
        columns = self._columns[:, None] + torch.arange(tail, device=self._columns.device)
        columns = columns.clamp(max=self._batch.input_ids.shape[1] - 1)
        return finals["norm"][torch.arange(len(self.rows.ids), device=columns.device)[:, None], columns]

    def select(self, rows: Sequence[int]) -> WholeForward:
        """See `Replay.select`."""
        return WholeForward(self.model, self.rows.select(rows), self.layers, self.site)


def first_replayed(layers: Sequence[int], site: Site) -> int:
    """The first block that has to run again when deltas are added at `layers`."""
    return layers[0] + (1 if site == "block" else 0)


def open_replay(
    model: EditableModel,
    rows: AnchoredRows,
    layers: Sequence[int],
    site: Site,
    layout: ModelLayout | None = None,
) -> Replay:
    """The fastest replay that is exact for this model: see `replay_is_exact`; for `layout` see `TailReplay`."""
    behind = first_replayed(layers, site) < model.layout.n_layers  # is there a block to replay?
    if behind and replay_is_exact(model):
        return TailReplay(model, rows, layers, site, layout)
    return WholeForward(model, rows, layers, site)


def replay_is_exact(model: EditableModel) -> bool:
    """Whether replaying the tail gives this model's own hidden states; tried once per model."""
    if model.replayable is None:
        tolerance = 1e-3 if model.dtype == torch.float32 else 5e-2
        model.packable = None
        model.packable = model.replayable = replay_agrees(model, tolerance)
        if not model.replayable:  # perhaps with padding
            model.replayable = replay_agrees(model, tolerance)
    return model.replayable


def replay_agrees(model: EditableModel, tolerance: float, layout: ModelLayout | None = None) -> bool:
    """Whether a `TailReplay` on made-up rows gives the hidden states of a whole forward pass.

    Args:
        model: The model.
        tolerance: Largest difference, in units of a row's largest hidden state.
        layout: As for `TailReplay`.
    """
    size = min(model.layout.d_vocab, 50)
    ids = [tuple((7 * i + 3) % size for i in range(n)) for n in (12, 9, 4)]
    rows = AnchoredRows(tuple(ids), (8, 6, 0))
    layer = min(1, model.layout.n_layers - 1)
    deltas = {layer: torch.ones(3, model.layout.d_model, device=model.device, dtype=model.dtype)}
    try:
        with torch.no_grad():
            replay = TailReplay(model, rows, [layer], "down_proj", layout)
            fast, part = replay.run(deltas), replay.select([2, 0]).run({layer: deltas[layer][:2]})
            slow = WholeForward(model, rows, [layer], "down_proj").run(deltas)
    except (TypeError, ValueError, RuntimeError, IndexError, KeyError, AttributeError):
        return False  # the architecture passes state between blocks that a replay cannot supply
    for found, row in ((fast[0], 0), (fast[1], 1), (fast[2], 2), (part[0], 2), (part[1], 0)):
        length = rows.tail_lengths[row]
        scale = slow[row, :length].float().abs().max().clamp(min=1.0)
        if (found[:length] - slow[row, :length]).float().abs().max() > tolerance * scale:
            return False
    return True


@contextmanager
def _record_columns(modules: Mapping[int, nn.Module], columns: Tensor) -> Iterator[dict[int, Tensor]]:
    """Outputs of the modules at one column per row, [rows, d_model]."""
    seen: dict[int, Tensor] = {}

    def hook_for(key: int) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            out = in_rows(first_tensor(output), len(columns))
            seen[key] = out[torch.arange(len(out), device=out.device), columns].detach().clone()

        return hook

    handles = [m.register_forward_hook(hook_for(key)) for key, m in modules.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def in_rows(tensor: Tensor, rows: int) -> Tensor:
    """[rows, seq, width] of what a module saw; some architectures flatten rows and positions for the MLP."""
    return tensor.reshape(rows, -1, tensor.shape[-1])


def _add_at_first(hidden: Tensor, delta: Tensor) -> Tensor:
    if delta.ndim == 3:
        return hidden + delta.to(hidden).reshape(hidden.shape)
    grid = in_rows(hidden, len(delta))
    changed = torch.cat([(grid[:, 0] + delta.to(grid))[:, None], grid[:, 1:]], dim=1)
    return changed.reshape(hidden.shape)


def _adder(columns: Tensor, delta: Tensor) -> Any:
    def change(out: Tensor) -> Tensor:
        grid = in_rows(out, len(columns))
        added = delta.to(out) if delta.ndim == 3 else delta.to(out)[:, None]
        place = columns[:, None] + torch.arange(added.shape[1], device=columns.device)
        rows, which = (place < grid.shape[1]).nonzero(as_tuple=True)  # padding of the tails may reach further
        spread = torch.zeros_like(grid).index_put((rows, place[rows, which]), added[rows, which])
        return (grid + spread).reshape(out.shape)

    return change
