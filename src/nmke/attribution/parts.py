"""Read many prompts in parts of bounded memory, as one readout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Int
from torch import Tensor

from nmke.attribution.base import Readout, Write, read_out
from nmke.attribution.rerun import Rerun
from nmke.models.load import EditableModel
from nmke.models.replay import AnchoredRows
from nmke.models.tokens import length_buckets, pad_batch

FLOATS = 1 << 26  # activations that one part may record
LEAST_TOKENS = 256


def read_rows(
    model: EditableModel,
    ids: Sequence[Sequence[int]],
    layers: Sequence[int],
    columns: Sequence[int] | None = None,
    targets: Int[Tensor, " prompts"] | None = None,
) -> Readout:
    """What `read_out` gives for these rows of token ids, in their order.

    Args:
        model: The model as it is now.
        ids: Token ids of each prompt.
        layers: Layers to read.
        columns: Index, among each prompt's tokens, of the one to read; None for the last.
        targets: Attribute these tokens instead of the predicted ones.
    """
    layout = model.layout
    each = sum(layout.layers[i].d_mlp + 3 * layout.d_model for i in layers)
    buckets = length_buckets([len(row) for row in ids], max(LEAST_TOKENS, FLOATS // each))
    if len(buckets) == 1:
        buckets = [list(range(len(ids)))]  # one part keeps the order, and so the bits of a plain readout
    parts = [_read(model, ids, layers, columns, targets, bucket) for bucket in buckets]
    if len(parts) == 1:
        return parts[0]
    order = torch.argsort(torch.tensor([i for bucket in buckets for i in bucket])).to(model.device)
    return _joined(parts, order)


def _read(
    model: EditableModel,
    ids: Sequence[Sequence[int]],
    layers: Sequence[int],
    columns: Sequence[int] | None,
    targets: Tensor | None,
    bucket: list[int],
) -> Readout:
    batch = pad_batch([list(ids[i]) for i in bucket], model.encoder.pad_id, device=model.device)
    at = None if columns is None else torch.tensor([columns[i] for i in bucket], device=model.device)
    return read_out(model, batch, layers, at, None if targets is None else targets[bucket])


def _joined(parts: Sequence[Readout], order: Int[Tensor, " prompts"]) -> Readout:
    """The parts as one readout, its prompts in `order`."""
    first = parts[0]
    factors = {i: torch.cat([p.writes[i].factors for p in parts])[order] for i in first.writes}
    reruns = [part.rerun for part in parts]
    ids = tuple(row for rerun in reruns for row in rerun.rows.ids)
    anchors = tuple(anchor for rerun in reruns for anchor in rerun.rows.anchors)
    rows = AnchoredRows(ids, anchors).select(order.tolist())
    answers = torch.cat([rerun.answers for rerun in reruns])[order]
    return replace(
        first,
        coefficients={i: torch.cat([p.coefficients[i] for p in parts])[order] for i in first.coefficients},
        middles={i: torch.cat([p.middles[i] for p in parts])[order] for i in first.middles},
        writes={i: Write(write.weight, factors[i]) for i, write in first.writes.items()},
        finals=torch.cat([p.finals for p in parts])[order],
        targets=torch.cat([p.targets for p in parts])[order],
        rerun=Rerun(first.rerun.model, rows, answers),
    )
