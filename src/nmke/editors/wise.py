"""WISE: a side copy of one down-projection, used where it answers much more strongly than it does to other text.

Source: Wang et al. 2024, arXiv:2405.14768: the side memory W' begins as W; a query x takes it if
Δ(x) = ‖A(x)(W' − W)‖₂ exceeds ε, the least Δ of the edits; trained on −log p(answer) plus the margin loss
max(0, Δᵢ − α) + max(0, β − Δₑ) + max(0, γ − (Δₑ − Δᵢ)) over edits e and irrelevant text i; each part of the stream
trains a random share ρ of the entries.
Differs: the route is chosen token by token, at the tokens that predict answers when training. α, β, γ keep the
paper's ratio 5 : 20 : 10, in units of the layer's mean output norm (β = 1). Batches train one side memory after
another, each its own random ρ = 0.2 of the entries; the paper trains copies and merges them with TIES. Irrelevant
text: the openers that key statistics are gathered from. Adam in place of SGD.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from nmke.editors.memory_layers import deep_layer, ordinary_inputs
from nmke.editors.method import SIDE_MEMORY, Batch, Method, methods
from nmke.editors.pipeline import BatchResult, Stopwatch
from nmke.editors.side import SideMemory
from nmke.editors.training import AnswerTails, added_to_output, answer_rows, fit, trainable_type
from nmke.models.load import EditableModel
from nmke.models.weights import DownProjection

NAME = "wise"


@dataclass(frozen=True)
class Margins:
    """Bounds of the routing activation Δ, in units of the layer's mean output norm.

    Args:
        other: α, irrelevant text stays below.
        edited: β, edits come above.
        apart: γ, least distance of the two.
    """

    other: float = 0.25
    edited: float = 1.0
    apart: float = 0.5

    def loss(self, edited: Float[Tensor, " reads"], other: Float[Tensor, " tokens"], unit: float) -> Tensor:
        """The margin loss, mean over edits, irrelevant tokens and their pairs."""
        low = (other - self.other * unit).clamp(min=0).mean()
        high = (self.edited * unit - edited).clamp(min=0).mean()
        gap = (self.apart * unit - (edited[:, None] - other[None])).clamp(min=0).mean()
        return (low + high + gap) / unit


def compute(batch: Batch) -> BatchResult:
    """Train the side memory on the batch; see `Compute`."""
    clock, model, config, (layer,) = Stopwatch(), batch.model, batch.config, batch.layers
    projection = DownProjection(model.layout.layers[layer].down_proj)
    with clock.stage("keys"):
        groups = [AnswerTails(model, group, layer) for group in answer_rows(model, batch.requests)]
        edited = torch.cat([group.inputs for group in groups])
        other = ordinary_inputs(model, layer)
        unit = float((other @ projection.read().to(other).T).norm(dim=1).mean())
    start, turn, threshold = _start(batch, projection)
    part = _random_part(start, config.seed + turn)
    change = torch.zeros_like(start, requires_grad=True)

    def side() -> Tensor:
        return start + part * change

    def losses(group: AnswerTails) -> Tensor:
        return group.losses(group.inputs @ side().T)

    margins, names = Margins(), [request.id for request in batch.requests]

    def penalty() -> Tensor:
        return margins.loss((edited @ side().T).norm(dim=1), (other @ side().T).norm(dim=1), unit)

    with clock.stage("training"):
        optimizer = torch.optim.Adam([change], lr=config.lr)
        ended = fit(groups, losses, optimizer, config, names, penalty=penalty)
    delta = side().detach()
    least = min(threshold, float((edited @ delta.T).norm(dim=1).min()))
    tensors = {
        "delta": delta.float(),
        "threshold": torch.tensor([least * (1 - 1e-4)]),  # rounding of a padded forward pass
        "turn": torch.tensor([turn + 1]),
        "layer": torch.tensor([layer]),
    }
    owners = tuple(range(len(batch.requests)))
    memory = SideMemory(NAME, tensors)
    return BatchResult((), {}, ended.as_targets(), {}, owners, {}, clock.seconds, memory)


@contextmanager
def recall(model: EditableModel, memory: SideMemory) -> Iterator[None]:
    """The side memory in force where Δ reaches ε; see `Recall`."""
    delta, threshold = memory.tensors["delta"], float(memory.tensors["threshold"])
    module = model.layout.layers[int(memory.tensors["layer"])].down_proj

    def add(seen: Tensor) -> Tensor:
        written = seen.to(delta.dtype) @ delta.T
        return written * (written.norm(dim=-1, keepdim=True) >= threshold)

    with added_to_output({module: add}):
        yield


def _start(batch: Batch, projection: DownProjection) -> tuple[Tensor, int, float]:
    """W' − W as it is, how many batches trained it, and ε."""
    kind = trainable_type(batch.model)
    if batch.side is None:
        return torch.zeros(projection.shape, dtype=kind, device=batch.model.device), 0, float("inf")
    held = batch.side.tensors
    return held["delta"].to(kind), int(held["turn"]), float(held["threshold"])


def _random_part(like: Tensor, seed: int, share: float = 0.2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(like.shape, generator=generator) < share).to(like)


methods.register(
    NAME,
    Method(
        compute=compute,
        recall=recall,
        defaults={"lr": 1e-3, "steps": 50, "stop_loss": 1e-2},
        max_layers=1,
        layers=deep_layer,
        remembers=False,
    ),
    source="arXiv:2405.14768",
    summary="a side copy of one down-projection, taken where it answers strongly",
    needs=(SIDE_MEMORY,),
    doc=__doc__,
)
