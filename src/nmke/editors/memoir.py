"""MEMOIR: a residual memory whose columns are shared out to edits by the pattern of their activation.

Source: Wang et al. 2025, arXiv:2506.07899: FFN(a) = W₀ a + W_m (M ⊙ a); M = TopHash(a) marks the k largest |a| behind
a fixed random permutation, so that an edit trains k columns of W_m, which begins at 0. A query takes the mask of the
stored edit with the largest overlap if that is at least τ, and no memory otherwise. SGD, lr 1, gradients clipped to 1.
Differs: a is taken token by token, at the tokens that predict answers when training (the paper averages over the
prompt), less its mean over openers. k is 0.28 of the neurons (the paper's 4096 of 14336), τ = 0.6.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nmke.editors.memory_layers import deep_layer, ordinary_inputs
from nmke.editors.method import SIDE_MEMORY, Batch, Method, methods
from nmke.editors.pipeline import BatchResult, Stopwatch
from nmke.editors.side import SideMemory
from nmke.editors.training import AnswerTails, added_to_output, answer_rows, fit, trainable_type
from nmke.models.load import EditableModel

NAME, SHARE, OVERLAP, CLIP = "memoir", 0.28, 0.6, 1.0


@dataclass(frozen=True)
class TopHash:
    """Marks the strongest neurons behind a permutation.

    Args:
        centre: Mean activation of ordinary text, [d_mlp].
        permutation: Where each neuron's mark goes, [d_mlp].
    """

    centre: Float[Tensor, " d_mlp"]
    permutation: Int[Tensor, " d_mlp"]

    def masks(self, activations: Float[Tensor, "tokens d_mlp"]) -> Int[Tensor, "tokens marks"]:
        """The marked neurons of each token, ascending."""
        count = max(1, round(SHARE * len(self.centre)))
        strongest = (activations - self.centre).abs().topk(count, dim=1).indices
        return self.permutation[strongest].sort(dim=1).values


def as_grid(marks: Int[Tensor, "tokens marks"], d_mlp: int) -> Float[Tensor, "tokens d_mlp"]:
    """Ones at the marked neurons, zeros elsewhere."""
    grid = torch.zeros(len(marks), d_mlp, device=marks.device)
    return grid.scatter_(1, marks.long(), 1.0)


def compute(batch: Batch) -> BatchResult:
    """Train the memory's columns that the batch's answer tokens mark; see `Compute`."""
    clock, model, (layer,) = Stopwatch(), batch.model, batch.layers
    with clock.stage("keys"):
        held = _held(batch, layer)
        groups = [AnswerTails(model, group, layer) for group in answer_rows(model, batch.requests)]
        hashing = TopHash(held["centre"], held["permutation"])
        marks = [hashing.masks(group.inputs.float()) for group in groups]
    memory = held["memory"].to(trainable_type(model)).clone().requires_grad_()  # [d_mlp d_model]
    masked = {
        id(group): group.inputs * as_grid(own, len(memory)) for group, own in zip(groups, marks, strict=True)
    }

    def losses(group: AnswerTails) -> Tensor:
        return group.losses(masked[id(group)] @ memory)

    def clip(*_: object) -> None:
        torch.nn.utils.clip_grad_norm_([memory], CLIP)

    with clock.stage("training"):
        names = [request.id for request in batch.requests]
        optimizer = torch.optim.SGD([memory], lr=batch.config.lr)
        optimizer.register_step_pre_hook(clip)
        ended = fit(groups, losses, optimizer, batch.config, names)
    stored = torch.cat([held["marks"], *(own.to(torch.int32) for own in marks)])
    tensors = {**held, "memory": memory.detach().float(), "marks": stored}
    owners = tuple(range(len(batch.requests)))
    return BatchResult((), {}, ended.as_targets(), {}, owners, {}, clock.seconds, SideMemory(NAME, tensors))


@contextmanager
def recall(model: EditableModel, memory: SideMemory) -> Iterator[None]:
    """The memory in force for tokens whose marks overlap an edit's; see `Recall`."""
    held = memory.tensors
    weights, hashing = held["memory"], TopHash(held["centre"], held["permutation"])
    grids = as_grid(held["marks"], len(weights))
    count = held["marks"].shape[1]

    def add(seen: Tensor) -> Tensor:
        tokens = seen.reshape(-1, seen.shape[-1]).to(weights.dtype)
        overlap = as_grid(hashing.masks(tokens), len(weights)) @ grids.T / count
        best, index = overlap.max(dim=1)
        written = (tokens * grids[index]) @ weights * (best >= OVERLAP)[:, None]
        return written.reshape(*seen.shape[:-1], -1)

    with added_to_output({model.layout.layers[int(held["layer"])].down_proj: add}):
        yield


def _held(batch: Batch, layer: int) -> dict[str, Tensor]:
    """The memory's tensors, made on first use."""
    if batch.side is not None:
        return dict(batch.side.tensors)
    model = batch.model
    d_mlp, d_model = model.layout.layers[layer].d_mlp, model.layout.d_model
    generator = torch.Generator().manual_seed(batch.config.seed)
    marks = max(1, round(SHARE * d_mlp))
    tensors = {
        "memory": torch.zeros(d_mlp, d_model),
        "marks": torch.zeros(0, marks, dtype=torch.int32),
        "permutation": torch.randperm(d_mlp, generator=generator).to(torch.int32),
        "layer": torch.tensor([layer]),
    }
    tensors = {name: tensor.to(model.device) for name, tensor in tensors.items()}
    return {**tensors, "centre": ordinary_inputs(model, layer).mean(dim=0).float()}


methods.register(
    NAME,
    Method(
        compute=compute,
        recall=recall,
        defaults={"lr": 1.0, "steps": 50, "stop_loss": 1e-2},
        max_layers=1,
        layers=deep_layer,
        remembers=False,
    ),
    source="arXiv:2506.07899",
    summary="a residual memory whose columns are shared out by activation pattern",
    needs=(SIDE_MEMORY,),
    doc=__doc__,
)
