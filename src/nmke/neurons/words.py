"""What a neuron says and what it hears: the tokens it promotes, and the texts that excite it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nmke.attribution.logits import wide
from nmke.models.load import EditableModel
from nmke.models.norms import FrozenNorm
from nmke.models.replay import in_rows
from nmke.models.tokens import length_buckets, pad_batch
from nmke.models.tracing import stop_after
from nmke.models.weights import DownProjection, written_matrix

Neuron = tuple[int, int]  # layer, index
TOKEN_BUDGET = 1024


@dataclass(frozen=True)
class PromotedTokens:
    """The tokens at either end of a neuron's value seen through the unembedding.

    Args:
        positive: Token and logit (above the mean token, per unit of coefficient, the final norm's statistic
            left out) raised most while the coefficient is positive.
        negative: The same while it is negative; logits are what a coefficient of -1 raises.
    """

    positive: tuple[tuple[str, float], ...]
    negative: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Excitement:
    """One place in a text where a neuron is strongly active.

    Args:
        text: The text up to and with the token at which it is.
        token: That token.
        coefficient: The neuron's coefficient there, signed.
    """

    text: str
    token: str
    coefficient: float


@torch.no_grad()
def promoted_tokens(
    model: EditableModel, values: Float[Tensor, "neurons d_model"], count: int = 5
) -> list[PromotedTokens]:
    """What each value vector (a column of a down-projection) says.

    Args:
        model: Gives final norm, unembedding and tokenizer.
        values: The vectors.
        count: Tokens at either end.
    """
    layout = model.layout
    norm = FrozenNorm.probe(layout.final_norm, layout.d_model)
    unembedding = wide(written_matrix(layout.unembedding))
    weighted = values.to(unembedding) * norm.weight.to(unembedding)
    found = []
    for row in weighted.split(64):
        logits = row @ unembedding.T
        logits = layout.logit_map.scale * (logits - logits.mean(dim=1, keepdim=True))
        found += [PromotedTokens(_tokens(model, one, count), _tokens(model, -one, count)) for one in logits]
    return found


def neuron_values(model: EditableModel, neurons: Sequence[Neuron]) -> Float[Tensor, "neurons d_model"]:
    """The columns of the down-projections that the neurons write with, as they are now."""
    columns = [DownProjection(model.layout.layers[layer].down_proj).read()[:, i] for layer, i in neurons]
    return torch.stack(columns) if columns else torch.empty(0, model.layout.d_model)


@torch.no_grad()
def exciting_prompts(
    model: EditableModel, neurons: Sequence[Neuron], texts: Sequence[str], count: int = 3
) -> dict[Neuron, tuple[Excitement, ...]]:
    """For each neuron, the texts in which its coefficient is largest in size, strongest first.

    Args:
        model: The model as it is now.
        neurons: Which ones.
        texts: Where to look; every token but the first (an attention sink in many models) counts.
        count: Texts per neuron; each gives its strongest token.
    """
    wanted: dict[int, list[int]] = defaultdict(list)
    for layer, index in neurons:
        wanted[layer].append(index)
    ids = [model.encoder.encode(text) for text in texts]
    peaks = {layer: torch.zeros(len(ids), len(chosen)) for layer, chosen in wanted.items()}
    places = {layer: torch.zeros(len(ids), len(chosen), dtype=torch.long) for layer, chosen in wanted.items()}
    for bucket in length_buckets([len(row) for row in ids], TOKEN_BUDGET):
        for layer, seen in _coefficients(model, [ids[i] for i in bucket], wanted).items():
            at = seen.abs().argmax(dim=1)  # [texts, chosen]
            peaks[layer][bucket] = seen.gather(1, at[:, None])[:, 0]
            places[layer][bucket] = at
    found: dict[Neuron, tuple[Excitement, ...]] = {}
    for layer, chosen in wanted.items():
        for column, index in enumerate(chosen):
            strongest = peaks[layer][:, column].abs().argsort(descending=True, stable=True)[:count].tolist()
            found[layer, index] = tuple(
                _excitement(model, ids[t], int(places[layer][t, column]), float(peaks[layer][t, column]))
                for t in strongest
            )
    return found


def _coefficients(
    model: EditableModel, ids: Sequence[Sequence[int]], wanted: dict[int, list[int]]
) -> dict[int, Float[Tensor, "texts seq chosen"]]:
    """Coefficients of the wanted neurons at every token but the first and the padding, which read 0."""
    batch = pad_batch([list(row) for row in ids], model.encoder.pad_id, device=model.device)
    real = batch.attention_mask.bool().clone()
    real[:, 0] = False
    seen: dict[int, Tensor] = {}

    def keep(layer: int, _module: nn.Module, args: tuple[Any, ...]) -> None:
        rows = wide(in_rows(args[0], len(ids))[..., wanted[layer]])
        seen[layer] = (rows * real[..., None]).cpu()

    downs = {layer: model.layout.layers[layer].down_proj for layer in wanted}
    handles = [down.register_forward_pre_hook(partial(keep, layer)) for layer, down in downs.items()]
    try:
        with stop_after(model.layout.layers[max(wanted)].block):
            model.model(**model.inputs(batch))
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _excitement(model: EditableModel, ids: Sequence[int], at: int, coefficient: float) -> Excitement:
    text = model.tokenizer.decode(ids[: at + 1], skip_special_tokens=True)
    return Excitement(text, model.tokenizer.decode([ids[at]]), coefficient)


def _tokens(
    model: EditableModel, logits: Float[Tensor, " d_vocab"], count: int
) -> tuple[tuple[str, float], ...]:
    best = logits.topk(count)
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return tuple((model.tokenizer.decode([token]), value) for token, value in pairs)
