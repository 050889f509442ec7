"""GRACE: a codebook of hidden states in front of one layer; near a key, the layer's output is the key's value.

Source: Hartvigsen et al. 2022, arXiv:2211.11031: if the layer's input h lies within ε_i of the nearest key, its output
is replaced by that key's value. An edit whose h lies farther than ε_i + ε_init from every key adds an entry (value
found by gradient descent on −log p(answer), 100 steps of Adam, lr 1); one with the same answer widens ε_i to reach it;
one with another answer halves both radii to d/2.
Differs: the layer is a decoder block. There is one entry per answer token, keyed by the state that predicts it, so
that answers of any length are recalled token by token. An edit at distance 0 of a key with another answer takes its
entry over. ε_init is `radius` times the norm of h, since states of different models differ in size; the paper's
ε_init = 1 is absolute.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from nmke.attribution.base import wide
from nmke.editors.memory_layers import deep_layer
from nmke.editors.method import SIDE_MEMORY, Batch, Method, methods
from nmke.editors.pipeline import BatchResult, Stopwatch
from nmke.editors.side import SideMemory
from nmke.editors.training import AnswerRows, Fit, answer_rows, at_answers, edit_losses, fit
from nmke.models.load import EditableModel
from nmke.models.tracing import first_tensor, record_inputs, record_outputs, with_first_tensor

NAME = "grace"
SAME = 1e-3  # distances below this share of ε_init count as 0: rounding of a padded forward pass


@dataclass(frozen=True)
class Codebook:
    """Entries of one layer.

    Args:
        keys: Inputs of the layer, [entries, d_model] float32.
        values: Outputs that take their place, [entries, d_model] float32.
        radii: ε of each entry, [entries] float32.
        labels: The answer token that the value leads to, [entries] int64.
    """

    keys: Float[Tensor, "entries d_model"]
    values: Float[Tensor, "entries d_model"]
    radii: Float[Tensor, " entries"]
    labels: Int[Tensor, " entries"]

    @classmethod
    def empty(cls, d_model: int, device: torch.device) -> Codebook:
        """No entries."""
        nothing = torch.zeros(0, d_model, device=device)
        return cls(nothing, nothing, nothing[:, 0], torch.zeros(0, dtype=torch.int64, device=device))

    def nearest(self, hidden: Float[Tensor, "queries d_model"]) -> tuple[Tensor, Tensor]:
        """Distance to the nearest key and its index, per query; the codebook must hold an entry."""
        distances = torch.cdist(hidden.float(), self.keys, compute_mode="donot_use_mm_for_euclid_dist")
        return distances.min(dim=1)

    def placed(self, key: Float[Tensor, " d_model"], label: int, radius: float) -> tuple[Codebook, int]:
        """The codebook with a place for an edit.

        Args:
            key: The layer's input where the answer token is predicted.
            label: That token.
            radius: ε_init.

        Returns:
            The codebook, and the index of the entry whose value must be found; -1 when one that is there serves.
        """
        if len(self.keys):
            (distance,), (index,) = (found.tolist() for found in self.nearest(key[None]))
            reach = float(self.radii[index])
            if distance <= reach + radius:
                if int(self.labels[index]) == label:
                    return self._with(index, radius=max(reach, distance)), -1
                if distance <= SAME * radius:
                    return self._with(index, label=label), index
                radius = distance / 2
                return self._with(index, radius=min(reach, radius))._added(key, label, radius)
        return self._added(key, label, radius)

    def _with(self, index: int, *, radius: float | None = None, label: int | None = None) -> Codebook:
        radii, labels = self.radii.clone(), self.labels.clone()
        if radius is not None:
            radii[index] = radius
        if label is not None:
            labels[index] = label
        return replace(self, radii=radii, labels=labels)

    def _added(self, key: Tensor, label: int, radius: float) -> tuple[Codebook, int]:
        book = Codebook(
            torch.cat([self.keys, key[None].float()]),
            torch.cat([self.values, torch.zeros_like(key[None], dtype=torch.float32)]),
            torch.cat([self.radii, self.radii.new_tensor([radius])]),
            torch.cat([self.labels, self.labels.new_tensor([label])]),
        )
        return book, len(self.keys)


def compute(batch: Batch) -> BatchResult:
    """Place the batch's answer tokens in the codebook and find the new values; see `Compute`."""
    clock, model, (layer,) = Stopwatch(), batch.model, batch.layers
    with clock.stage("keys"):
        groups = answer_rows(model, batch.requests)
        book, new = _place(model, groups, layer, read(batch.side, model), batch.config.radius)
    with clock.stage("training"):
        book, ended = _train(batch, groups, layer, book, new)
    side = SideMemory(NAME, {**vars(book), "layer": torch.tensor([layer])})
    owners = tuple(range(len(batch.requests)))
    return BatchResult((), {}, ended.as_targets(), {}, owners, {}, clock.seconds, side)


@contextmanager
def recall(model: EditableModel, memory: SideMemory) -> Iterator[None]:
    """The codebook in force; see `Recall`."""
    with recalled(model, int(memory.tensors["layer"]), read(memory, model)):
        yield


def read(memory: SideMemory | None, model: EditableModel) -> Codebook:
    """The codebook that a memory holds, an empty one for None."""
    if memory is None:
        return Codebook.empty(model.layout.d_model, model.device)
    return Codebook(**{name: memory.tensors[name] for name in ("keys", "values", "radii", "labels")})


@contextmanager
def recalled(model: EditableModel, layer: int, book: Codebook) -> Iterator[None]:
    """Near a key the layer's output is the key's value, inside the `with`."""

    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        hidden, out = first_tensor(args or kwargs["hidden_states"]), first_tensor(output)
        distance, index = book.nearest(hidden.reshape(-1, hidden.shape[-1]))
        hit = (distance <= book.radii[index]).reshape(out.shape[:-1])
        values = book.values[index].reshape(out.shape).to(out)
        return with_first_tensor(output, torch.where(hit[..., None], values, out))

    handle = model.layout.layers[layer].block.register_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def _place(
    model: EditableModel, groups: list[AnswerRows], layer: int, book: Codebook, radius: float
) -> tuple[Codebook, list[int]]:
    """The codebook with a place for every answer token, and the entries whose values are to be found.

    Their values begin as what the layer gives there now.
    """
    block, new = {"block": model.layout.layers[layer].block}, []
    for group in groups:
        with record_inputs(block) as inputs, record_outputs(block) as outputs:
            model.model(**model.inputs(group.batch))
        keys, values = (wide(at_answers(group, seen["block"])) for seen in (inputs, outputs))
        for key, value, label in zip(keys, values, group.tokens.tolist(), strict=True):
            book, entry = book.placed(key, label, radius * float(key.norm()))
            if entry >= 0:
                at = torch.tensor([entry], device=key.device)
                book = replace(book, values=book.values.index_copy(0, at, value[None].float()))
                new.append(entry)
    return book, sorted(set(new))


def _train(
    batch: Batch, groups: list[AnswerRows], layer: int, book: Codebook, new: list[int]
) -> tuple[Codebook, Fit]:
    """Find the values of the new entries, with the whole codebook in force."""
    names, index = [request.id for request in batch.requests], torch.tensor(new, dtype=torch.int64)
    index = index.to(book.values.device)
    found = book.values[index].clone().requires_grad_()

    def losses(group: AnswerRows) -> Tensor:
        values = book.values.index_copy(0, index, found)
        with recalled(batch.model, layer, replace(book, values=values)):
            return edit_losses(batch.model, group)

    if not new:
        with torch.no_grad():
            known = {e: float(x) for group in groups for e, x in zip(group.edits, losses(group), strict=True)}
        return book, Fit([known[i] for i in range(len(names))], 0)
    ended = fit(groups, losses, torch.optim.Adam([found], lr=batch.config.lr), batch.config, names)
    return replace(book, values=book.values.index_copy(0, index, found.detach())), ended


methods.register(
    NAME,
    Method(
        compute=compute,
        recall=recall,
        defaults={"lr": 1.0, "steps": 100, "stop_loss": 1e-2},
        max_layers=1,
        layers=deep_layer,
        remembers=False,
    ),
    source="arXiv:2211.11031",
    summary="a codebook that replaces a layer's output near the edits' hidden states",
    needs=(SIDE_MEMORY,),
    doc=__doc__,
)
