"""Tails run without their padding: the real tokens of all rows stand behind one another in a single row.

Norms, projections and MLPs do not care which row a token is from, so a block runs on [1, tokens, d_model] as it
stands. Attention does: while `Packing.attention` is open, the blocks' attention is `packed_attention`, which puts
the tokens back into their rows, reads the frozen prefix beside them and packs what comes out. It is registered
under a name of its own by the interface that transformers has for that.

A product of a few dozen rows costs little more than its operations, so that what padding adds is lost time; and a
prefix that is read where it stands, without being joined to the tail, needs no copy and no gradient.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from nmke.models.prefix import States

NAME = "nmke_packed"
READABLE = ("sdpa", "eager")  # implementations whose masks and results `packed_attention` stands in for
FOREIGN = ("s_aux", "position_bias")  # what some models add to the scores; not done here
_OPEN: ContextVar[Packing | None] = ContextVar("open packing", default=None)
Call = tuple[tuple[Any, ...], dict[str, Any]]


class UnpackableError(ValueError):
    """A block is called with something, or attends in a way, that packed rows do not have; never reaches users."""


class Packing:
    """Where the real tokens of right-padded tails stand, and the prefixes that they look back at.

    Args:
        lengths: Real tokens of each row, at least one.
        prefix: Keys and values before the tail for every block, [rows, heads, prefix, d_head]; none at all where
            no row has a prefix.
        first: The first block that will be run; prefixes of those before it are not read.
        device: Where indices are kept.
    """

    def __init__(
        self, lengths: Sequence[int], prefix: States, first: int, device: torch.device | str = "cpu"
    ) -> None:
        counts = torch.tensor(list(lengths), device=device)
        self.rows, self.width = len(lengths), max(lengths)
        real = torch.arange(self.width, device=device) < counts[:, None]
        self.index = real.flatten().nonzero()[:, 0]
        self.fill = torch.zeros(self.rows * self.width, dtype=torch.long, device=device)
        self.fill[self.index] = torch.arange(len(self.index), device=device)
        self.starts = counts.cumsum(0) - counts
        self._prefix = {
            layer: (_by_head(keys), _by_head(values))
            for layer, (keys, values) in enumerate(prefix)
            if layer >= first
        }

    def pack(self, padded: Tensor) -> Tensor:
        """[rows, width, ...] to [1, tokens, ...]."""
        return _Packed.apply(padded.reshape(-1, *padded.shape[2:]), 0, self.index)[None]

    def unpack(self, packed: Tensor) -> Tensor:
        """[1, tokens, ...] to [rows, width, ...]; padding repeats some token and takes no gradient."""
        spread = _Spread.apply(packed[0], 0, self.fill, self.index)
        return spread.reshape(self.rows, self.width, *packed.shape[2:])

    def added(self, hidden: Tensor, delta: Tensor) -> Tensor:
        """What a module gives for packed rows, [1, tokens, d_model] or flat, with `delta` added to it.

        Args:
            hidden: What it gives.
            delta: For the anchors, [rows, d_model], or for whole tails, [rows, width, d_model].
        """
        if delta.ndim == 3:
            return hidden + self.pack(delta).to(hidden).reshape(hidden.shape)
        flat = hidden.reshape(-1, hidden.shape[-1])
        return flat.index_add(0, self.starts.to(flat.device), delta.to(flat)).reshape(hidden.shape)

    def calls(self, calls: Sequence[Call]) -> tuple[Call, ...]:
        """What padded blocks were called with, as packed blocks are to be called.

        Raises:
            UnpackableError: If a block is given something of which it is not clear which token it belongs to.
        """
        made: dict[int, Tensor] = {}

        def packed(value: Any) -> Any:
            if isinstance(value, Cache):
                return None  # prefixes are read by `packed_attention`
            if isinstance(value, Tensor):
                if id(value) not in made:
                    made[id(value)] = self._packed(value)
                return made[id(value)]
            if isinstance(value, dict):
                return {name: packed(item) for name, item in value.items()}
            if isinstance(value, list | tuple):
                return type(value)(packed(item) for item in value)
            return value

        return tuple((packed(args), packed(kwargs)) for args, kwargs in calls)

    def _packed(self, value: Tensor) -> Tensor:
        if value.ndim < 2:
            return value
        if value.ndim == 4 and value.shape[1] == 1 and value.shape[2] == self.width:
            return _additive(value)
        if value.ndim <= 3 and len(value) in (1, self.rows) and value.shape[1] == self.width:
            return self.pack(value.expand(self.rows, *value.shape[1:]))
        raise UnpackableError(f"a block is called with a tensor {tuple(value.shape)}")

    @contextmanager
    def attention(self, configs: Sequence[Any]) -> Iterator[None]:
        """While open, modules with these configs attend by `packed_attention` to these rows.

        Raises:
            UnpackableError: If one of them attends in another way than `READABLE`.
        """
        before = [config._attn_implementation for config in configs]
        if not before or not set(before) <= set(READABLE):
            raise UnpackableError(f"attention by {sorted(set(map(str, before)))}")
        token = _OPEN.set(self)
        try:
            for config in configs:
                config._attn_implementation = NAME
            yield
        finally:
            _OPEN.reset(token)
            for config, name in zip(configs, before, strict=True):
                config._attn_implementation = name

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scaling: float,
        softcap: float | None = None,
    ) -> Tensor:
        """Attention of packed queries to their rows' prefixes and tails, [1, tokens, heads, d_head].

        Args:
            layer: Whose prefixes are meant.
            query: [1, heads, tokens, d_head].
            key: [1, key heads, tokens, d_head].
            value: The same.
            mask: What is added to the scores, [rows, 1, width, prefix + width]; None: causal.
            scaling: Factor of the scores.
            softcap: What scores are held below, by tanh, before the mask; None: not.
        """
        heads, groups = key.shape[1], query.shape[1] // key.shape[1]
        each = (heads, groups, self.rows, self.width)
        queries = _Spread.apply(query[0], 1, self.fill, self.index).view(*each, -1).transpose(1, 2)
        queries = queries.reshape(heads * self.rows, groups * self.width, -1)
        keys, values = (
            _Spread.apply(every[0], 1, self.fill, self.index).view(heads * self.rows, self.width, -1)
            for every in (key, value)
        )
        before = self._prefix.get(layer)
        scores = torch.bmm(queries, keys.transpose(1, 2))
        if before is not None:
            scores = torch.cat([torch.bmm(queries, before[0].transpose(1, 2)), scores], dim=2)
        scores = scores.view(heads, self.rows, groups, self.width, -1) * scaling
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores + (self._causal(scores) if mask is None else mask)
        weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(value)
        weights = weights.view(heads * self.rows, groups * self.width, -1)
        split = weights.shape[2] - self.width
        found = torch.bmm(weights[..., split:], values)
        if before is not None:
            found = found + torch.bmm(weights[..., :split], before[1])
        found = found.view(heads, self.rows, groups, self.width, -1).transpose(1, 2)
        found = found.reshape(heads * groups, self.rows * self.width, -1)
        return _Packed.apply(found, 1, self.index).transpose(0, 1)[None]

    def _causal(self, scores: Tensor) -> Tensor:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device)
        return _additive(seen.tril(scores.shape[-1] - self.width)).to(scores)


def attention_configs(blocks: Sequence[nn.Module]) -> list[Any]:
    """The configs that these blocks' modules read their way of attending from, each once."""
    found = {
        id(module.config): module.config
        for block in blocks
        for module in block.modules()
        if hasattr(getattr(module, "config", None), "_attn_implementation")
    }
    return list(found.values())


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers asks for it; to the rows of the packing that is open, to plain rows without one.

    Raises:
        UnpackableError: If the model adds something of its own to the scores.
    """
    packing = _OPEN.get()
    if packing is None:  # another thread runs the same model
        return sdpa_attention_forward(
            module, query, key, value, attention_mask,
            scaling=scaling, dropout=dropout, softcap=softcap, **others,
        )  # fmt: skip
    foreign = [name for name in FOREIGN if others.get(name) is not None]
    layer = getattr(module, "layer_idx", None)
    if foreign or not isinstance(layer, int):
        raise UnpackableError(f"{type(module).__name__} attends with {foreign or 'no layer_idx'}")
    factor = query.shape[-1] ** -0.5 if scaling is None else scaling
    return packing.attend(layer, query, key, value, attention_mask, factor, softcap), None


def _by_head(states: Tensor) -> Tensor:
    """[rows, heads, prefix, d_head] to [heads * rows, prefix, d_head]."""
    return states.transpose(0, 1).reshape(-1, *states.shape[2:])


def _additive(mask: Tensor) -> Tensor:
    """A mask of truth values as what it adds to scores; one that is added already as it is."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, torch.finfo(torch.float32).min)


class _Packed(torch.autograd.Function):
    """The real tokens alone; padding gets a gradient of zero."""

    @staticmethod
    def forward(ctx: Any, padded: Tensor, dim: int, index: Tensor) -> Tensor:
        ctx.dim, ctx.index, ctx.shape = dim, index.to(padded.device), padded.shape
        return padded.index_select(dim, ctx.index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.new_zeros(ctx.shape).index_copy(ctx.dim, ctx.index, grad), None, None


class _Spread(torch.autograd.Function):
    """Real tokens back in their places; padding repeats the first one and gives it no gradient."""

    @staticmethod
    def forward(ctx: Any, packed: Tensor, dim: int, fill: Tensor, index: Tensor) -> Tensor:
        ctx.dim, ctx.index = dim, index.to(packed.device)
        return packed.index_select(dim, fill.to(packed.device))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return grad.index_select(ctx.dim, ctx.index), None, None, None


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
