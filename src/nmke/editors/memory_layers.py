"""Where side memories stand, and what ordinary text looks like there."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from nmke.attribution.base import wide
from nmke.models.load import EditableModel
from nmke.models.replay import in_rows
from nmke.models.tokens import pad_batch
from nmke.models.tracing import record_inputs, stop_after
from nmke.stats.corpus import openers

DEPTH = 0.8  # the papers' layer 27 of 32 and 35 of 48 lie between 0.73 and 0.84
OPENERS = 64


def deep_layer(n_layers: int) -> tuple[int, ...]:
    """The one layer at the papers' relative depth; never the last, which cannot be edited."""
    return (min(max(0, round(DEPTH * n_layers)), max(0, n_layers - 2)),)


@torch.no_grad()
def ordinary_inputs(model: EditableModel, layer: int) -> Float[Tensor, "tokens d_mlp"]:
    """What a layer's down-projection reads at the tokens of some openers, position 0 left out."""
    ids = [model.encoder.encode(text) for text in openers()[:OPENERS]]
    batch = pad_batch(ids, model.encoder.pad_id, device=model.device)
    parts = model.layout.layers[layer]
    with record_inputs({"down": parts.down_proj}) as seen, stop_after(parts.block):
        model.model(**model.inputs(batch))
    real = (batch.attention_mask > 0) & (batch.position_ids > 0)
    return wide(in_rows(seen["down"], len(ids))[real])
