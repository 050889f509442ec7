"""Keys and values of the tokens before an anchor, computed once and kept while the tail behind it is replayed.

The rows of a batch begin alike: every edit's prompt stands behind the same few contexts. What two rows have
in common at their beginning is run once, and each row goes on from there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from nmke.models.load import EditableModel
from nmke.models.tokens import TokenBatch, pad_batch
from nmke.models.tracing import stop_after

SHORTEST_HEAD = 4  # tokens; a shorter common beginning is not worth a pass of its own
States = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class AnchoredRows:
    """Token rows, each with the index of its anchor; the tail begins at the anchor.

    Args:
        ids: Token ids of each row.
        anchors: Index of each row's anchor token.
    """

    ids: tuple[tuple[int, ...], ...]
    anchors: tuple[int, ...]

    @classmethod
    def of(cls, batch: TokenBatch, columns: Tensor) -> AnchoredRows:
        """The real tokens of each row of a batch; the anchors stand at these columns, [rows]."""
        pairs = zip(batch.input_ids, batch.attention_mask.bool(), strict=True)
        ids = tuple(tuple(row[real].tolist()) for row, real in pairs)
        shifts = [batch.column(row, 0) for row in range(len(ids))]
        return cls(ids, tuple(c - s for c, s in zip(columns.tolist(), shifts, strict=True)))

    @property
    def tail_lengths(self) -> list[int]:
        """Tokens from the anchor to the end, per row."""
        return [len(ids) - anchor for ids, anchor in zip(self.ids, self.anchors, strict=True)]

    def select(self, rows: Sequence[int]) -> AnchoredRows:
        """The rows named, in that order."""
        return AnchoredRows(tuple(self.ids[r] for r in rows), tuple(self.anchors[r] for r in rows))


class FrozenPrefixLayer(DynamicLayer):
    """Keys and values of the tokens before the anchor; an update joins them to new ones and keeps nothing."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """The frozen prefix followed by the new states, [batch, heads, prefix + new, d_head]."""
        return torch.cat([self.keys, key_states], dim=-2), torch.cat([self.values, value_states], dim=-2)


class LatestLayer(DynamicLayer):
    """Holds the states of the latest run alone, so that a block can be run again on other weights."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """The new states, [batch, heads, seq, d_head]."""
        self.lazy_initialization(key_states, value_states)
        self.keys, self.values = key_states, value_states
        return key_states, value_states


class _GrowingLayer(FrozenPrefixLayer):
    """The same, but what is joined is kept."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        self.keys, self.values = super().update(key_states, value_states)
        return self.keys, self.values


def prefix_states(model: EditableModel, rows: AnchoredRows) -> States:
    """Keys and values of the prefixes, left-padded.

    Returns:
        Per block, keys and values [rows, heads, longest prefix, d_head]; nothing if every anchor is 0.
    """
    if max(rows.anchors) == 0:
        return []
    prefixes = [ids[:anchor] for ids, anchor in zip(rows.ids, rows.anchors, strict=True)]
    heads = common_heads(prefixes)
    if not any(heads):
        return _left_padded_pass(model, prefixes)
    distinct = sorted({head for head in heads if head})
    states = _left_padded_pass(model, distinct)
    place = torch.tensor([distinct.index(head) if head else 0 for head in heads], device=model.device)
    split = AnchoredRows(tuple(prefixes), tuple(len(head) for head in heads))
    layers = [_GrowingLayer(keys[place], values[place]) for keys, values in states]
    _run(model, tail_inputs(model, split, Cache(layers=layers)))
    return _moved_right([(layer.keys, layer.values) for layer in layers], split)


def common_heads(rows: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """For each row the beginning that it shares with others, at least one token shorter than itself.

    Rows are taken in sorted order, so that rows that begin alike stand together; a row joins the group before
    it while at least half of the group's head, and `SHORTEST_HEAD` tokens, remain common. () where nothing is.
    """
    order = sorted(range(len(rows)), key=lambda r: rows[r])
    groups: list[tuple[list[int], tuple[int, ...]]] = []
    for r in order:
        own = rows[r][:-1]
        if groups:
            members, head = groups[-1]
            shared = _common(head, own)
            if len(shared) >= max(SHORTEST_HEAD, len(head) / 2):
                groups[-1] = ([*members, r], shared)
                continue
        groups.append(([r], own))
    found: list[tuple[int, ...]] = [()] * len(rows)
    for members, head in groups:
        for r in members if len(members) > 1 else ():
            found[r] = head
    return found


def _common(first: tuple[int, ...], second: tuple[int, ...]) -> tuple[int, ...]:
    length = 0
    for a, b in zip(first, second, strict=False):
        if a != b:
            break
        length += 1
    return first[:length]


def _left_padded_pass(model: EditableModel, rows: Sequence[tuple[int, ...]]) -> States:
    batch = pad_batch([list(ids) for ids in rows], model.encoder.pad_id, side="left", device=model.device)
    cache = DynamicCache()
    _run(model, {**model.inputs(batch), "past_key_values": cache, "use_cache": True})
    return [(layer.keys, layer.values) for layer in cache.layers]


def _run(model: EditableModel, inputs: dict[str, Any]) -> None:
    with torch.no_grad(), stop_after(model.layout.layers[-1].block):
        model.model(**inputs)


def _moved_right(states: States, split: AnchoredRows) -> States:
    """[left padding | head | rest | right padding] of each row as [left padding | head | rest]."""
    lengths = torch.tensor([len(ids) for ids in split.ids])
    rests = torch.tensor(split.tail_lengths)
    longest, width = int(lengths.max()), states[0][0].shape[-2]
    columns = torch.arange(longest) - longest + max(split.anchors) + rests[:, None]
    index = columns.clamp(0, width - 1).to(states[0][0].device)[:, None, :, None]

    def moved(tensor: Tensor) -> Tensor:
        return tensor.gather(-2, index.expand(-1, tensor.shape[1], -1, tensor.shape[-1]))

    return [(moved(keys), moved(values)) for keys, values in states]


def select_states(states: States, rows: Sequence[int], longest: int) -> States:
    """The states of a part of the rows, the longest of whose prefixes has `longest` tokens."""
    if longest == 0:
        return []
    index = torch.tensor(list(rows), device=states[0][0].device)
    return [(k[index][..., -longest:, :], v[index][..., -longest:, :]) for k, v in states]


def tail_inputs(model: EditableModel, rows: AnchoredRows, prefix: Cache | None) -> dict[str, Any]:
    """Inputs of a forward pass over the tails: right-padded, behind the left-padded prefix."""
    tails = [list(ids[anchor:]) for ids, anchor in zip(rows.ids, rows.anchors, strict=True)]
    tail: TokenBatch = pad_batch(tails, model.encoder.pad_id, side="right", device=model.device)
    inputs = dict(model.inputs(tail))
    if prefix is None:
        return inputs
    split = max(rows.anchors)
    anchors = torch.tensor(rows.anchors, device=model.device)
    before = (torch.arange(split, device=model.device) >= (split - anchors)[:, None]).to(tail.attention_mask)
    inputs["attention_mask"] = torch.cat([before, tail.attention_mask], dim=1)
    if "position_ids" in inputs:
        width = torch.arange(tail.input_ids.shape[1], device=model.device)
        inputs["position_ids"] = anchors[:, None] + width
    return {**inputs, "past_key_values": prefix, "use_cache": True}
