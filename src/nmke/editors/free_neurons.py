"""Which neurons a fact may have for its own (`nmke.editors.nmke`): the layer, and in it those that are given up first.

Layers are filled one after another, the lowest first, each to a half. A neuron is free as long as it reads what it
reads in the unedited model, so that undoing an edit frees its neuron.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nmke.editors.method import Batch
from nmke.editors.pipeline import mask_seed
from nmke.errors import ConfigError
from nmke.models.load import EditableModel
from nmke.models.replay import in_rows
from nmke.models.tokens import pad_batch
from nmke.models.tracing import record_inputs, stop_after
from nmke.stats.corpus import openers
from nmke.types import MatrixPlace, NeuronMask

LARGEST_SHARE = 0.5  # of a layer's neurons that edits may take before the next layer is begun
Chosen = Int[Tensor, " edits"]


def own_layers(n_layers: int) -> tuple[int, ...]:
    """A sixth of the layers, a little behind the middle: edits there generalize best (`docs/research.md`)."""
    if n_layers <= 5:
        return (max(0, n_layers // 2 - 1),)
    first = round(0.53 * n_layers)
    return tuple(range(first, max(first + 1, round(0.7 * n_layers))))


def homes_of(batch: Batch, owners: Sequence[int]) -> list[int]:
    """The layer that takes each row of the batch: the first that has room, the last one when none has.

    Args:
        batch: What is edited.
        owners: The request of each row; second anchors, at the end, stay with their request.
    """
    room = {}
    for layer in batch.layers:
        free = free_neurons(batch.model, layer)
        room[layer] = int(free.sum()) - int((1 - LARGEST_SHARE) * len(free))
    homes: list[int] = []
    for row, owner in enumerate(owners):
        home = homes[owner] if owner < row else next((i for i in room if room[i] > 0), batch.layers[-1])
        room[home] -= 1
        homes.append(home)
    return homes


def choose_own(batch: Batch, layer: int, count: int) -> tuple[Chosen, NeuronMask]:
    """The neurons of a layer that a batch takes.

    Args:
        batch: What is edited, with mask "least" or "random".
        layer: Where.
        count: How many are needed, one for each row of the batch.

    Returns:
        Their indices, one per row, and the mask for the record.

    Raises:
        ConfigError: If fewer are left.
    """
    free = free_neurons(batch.model, layer)
    available = int(free.sum())
    if available < count:
        raise ConfigError(
            f"{count} neurons of layer {layer} were asked for; {available} of {len(free)} are not held by earlier "
            "edits: edit more layers, undo superseded edits, or begin another run"
        )
    if batch.config.mask == "random":
        generator = torch.Generator().manual_seed(mask_seed(batch.config, batch.turn, layer))
        order = torch.rand(len(free), generator=generator).to(free.device)
    else:
        order = importance(batch, layer)
    index = order.double().masked_fill(~free, float("inf")).argsort(stable=True)[:count]
    keep = torch.zeros_like(free)
    keep[index] = True
    counts = {"kept": float(count), "d_mlp": float(len(free)), "free": float(available)}
    return index, NeuronMask(keep, counts)


def free_neurons(model: EditableModel, layer: int) -> Tensor:
    """True where a neuron reads what it reads in the unedited model, [d_mlp]."""
    parts = model.layout.layers[layer]
    place = MatrixPlace(layer, "up" if parts.read_in.gate is None else "gate")
    now = parts.matrix(place.part).read()
    return (now == model.unedited.get(place, now)).all(dim=0)


def importance(batch: Batch, layer: int) -> Float[Tensor, " d_mlp"]:
    """How much each neuron of the unedited model writes, on ordinary text or at its first token, whichever is more.

    The first token is an attention sink that few neurons keep up, one of 2,048 in a layer of Gemma 3; the statistics
    of keys do not have it.
    """
    model = batch.model
    now = model.layout.layers[layer].matrix("down").read()
    column = model.unedited.get(MatrixPlace(layer), now).double()
    squares = torch.maximum(
        batch.stats[layer].mean_squares.double().to(column.device), _first_token_squares(model, layer)
    )
    return squares * column.square().sum(dim=0)


@torch.no_grad()
def _first_token_squares(model: EditableModel, layer: int) -> Float[Tensor, " d_mlp"]:
    """E[k_i²] at position 0, over the first tokens of the openers."""
    firsts = sorted({model.encoder.encode(opener)[0] for opener in openers()})
    batch = pad_batch([[first] for first in firsts], model.encoder.pad_id, device=model.device)
    parts = model.layout.layers[layer]
    with record_inputs({layer: parts.down_proj}) as seen, stop_after(parts.block):
        model.model(**model.inputs(batch))
    return in_rows(seen[layer], len(firsts))[:, 0].double().square().mean(dim=0)
