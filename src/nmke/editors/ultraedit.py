"""UltraEdit: one backward pass and one ridge solve per layer, on features normalised over the whole stream.

Source: Gu et al. 2025, arXiv:2505.14679: for every answer token, h is the module's input at the position that
predicts it and g the gradient of the loss by the module's output there. Running mean and deviation over all edits so
far normalise [h, g] to [ĥ, ĝ]. With v = −η ‖ĥ‖² ĝ the shift is ΔWᵀ = (HᵀH + I)⁻¹ HᵀV.
Differs: the modules are down-projections of the edited layers. H holds h as the layer reads it, since that is what
the shift acts on; whether the paper puts ĥ there could not be confirmed. The statistics count the batch itself; with
fewer than two answer tokens in all there is no deviation yet and the features are taken as they are. η is `lr`; its
default 3e-5 stands for the paper's 1e-6, whose models have ten times the neurons: ‖ĥ‖² grows with their number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nmke.attribution.base import wide
from nmke.editors.method import SIDE_MEMORY, Batch, Method, methods
from nmke.editors.pipeline import BatchResult, Stopwatch
from nmke.editors.side import SideMemory
from nmke.editors.solve import solve_positive
from nmke.editors.training import AnswerRows, Fit, answer_rows, at_answers, edit_losses
from nmke.models.load import EditableModel
from nmke.models.tracing import first_tensor, record_inputs, with_first_tensor
from nmke.types import LayerUpdate

NAME = "ultraedit"
Features = Float[Tensor, "reads width"]


@dataclass(frozen=True)
class Running:
    """Mean and squared deviation of features over a stream (Welford, by batches).

    Args:
        count: Rows seen.
        mean: [width] float64.
        squares: Summed squared deviation from the mean, [width] float64.
    """

    count: int
    mean: Tensor
    squares: Tensor

    def add(self, rows: Features) -> Running:
        """The statistics with more rows."""
        rows = rows.double()
        count, mean = len(rows), rows.mean(dim=0)
        total, apart = self.count + count, mean - self.mean
        squares = (
            self.squares + (rows - mean).square().sum(dim=0) + apart.square() * self.count * count / total
        )
        return Running(total, self.mean + apart * count / total, squares)

    def normalise(self, rows: Features) -> Features:
        """The rows in units of the deviation around the mean; as they are while fewer than two were seen."""
        if self.count < 2:
            return rows
        deviation = (self.squares / (self.count - 1)).sqrt()
        return (rows - self.mean) / (deviation + 1e-8)


def shift(hidden: Features, gradients: Features, running: Running, rate: float) -> tuple[Tensor, Tensor]:
    """Left and right factor of ΔW for one layer, float64.

    Args:
        hidden: h, [reads, d_mlp].
        gradients: g, [reads, d_model].
        running: Statistics of [h, g], this batch included.
        rate: η.

    Raises:
        NumericsError: If the features are not finite.
    """
    normal = running.normalise(torch.cat([hidden, gradients], dim=1))
    own, slope = normal[:, : hidden.shape[1]], normal[:, hidden.shape[1] :]
    values = -rate * own.square().sum(dim=1, keepdim=True) * slope  # [reads d_model]
    system = hidden @ hidden.T
    system.diagonal().add_(1.0)
    right = solve_positive(system, hidden, what="H Hᵀ + I", cure="load the model in float32")
    return values.T, right


def compute(batch: Batch) -> BatchResult:
    """One shift per layer; see `Compute`."""
    clock, model = Stopwatch(), batch.model
    with clock.stage("gradients"):
        groups = answer_rows(model, batch.requests)
        losses, features = _features(model, groups, batch.layers, len(batch.requests))
    updates, tensors = [], {} if batch.side is None else dict(batch.side.tensors)
    with clock.stage("solve"):
        for layer, (hidden, gradients) in features.items():
            running = _running(tensors, layer, hidden.shape[1] + gradients.shape[1], model.device)
            running = running.add(torch.cat([hidden, gradients], dim=1))
            left, right = shift(hidden, gradients, running, batch.config.lr)
            updates.append(LayerUpdate(layer, left.float().contiguous(), right.float().contiguous()))
            tensors[f"{layer}/count"] = torch.tensor([running.count])
            tensors[f"{layer}/mean"], tensors[f"{layer}/squares"] = running.mean, running.squares
    ended, owners = Fit(losses, 1).as_targets(), tuple(range(len(batch.requests)))
    side = SideMemory(NAME, tensors)
    return BatchResult(tuple(updates), {}, ended, {}, owners, {}, clock.seconds, side)


def _running(tensors: dict[str, Tensor], layer: int, width: int, device: torch.device) -> Running:
    if f"{layer}/count" not in tensors:
        nothing = torch.zeros(width, dtype=torch.float64, device=device)
        return Running(0, nothing, nothing)
    return Running(int(tensors[f"{layer}/count"]), tensors[f"{layer}/mean"], tensors[f"{layer}/squares"])


def _features(
    model: EditableModel, groups: list[AnswerRows], layers: tuple[int, ...], count: int
) -> tuple[list[float], dict[int, tuple[Features, Features]]]:
    """Losses per request; per layer, inputs and output gradients at the positions that predict answers."""
    parts = {i: model.layout.layers[i].down_proj for i in layers}
    losses = [0.0] * count
    hidden: dict[int, list[Tensor]] = {i: [] for i in layers}
    gradients: dict[int, list[Tensor]] = {i: [] for i in layers}
    for group in groups:
        with record_inputs(parts) as inputs, _probes(parts) as probes:
            each = edit_losses(model, group)
            slopes = torch.autograd.grad(each.sum(), [probes[i] for i in layers])
        for edit, loss in zip(group.edits, each.tolist(), strict=True):
            losses[edit] = loss
        for layer, slope in zip(layers, slopes, strict=True):
            hidden[layer].append(wide(at_answers(group, inputs[layer].detach())).double())
            gradients[layer].append(wide(at_answers(group, slope)).double())
    return losses, {i: (torch.cat(hidden[i]), torch.cat(gradients[i])) for i in layers}


@contextmanager
def _probes(modules: Mapping[int, nn.Module]) -> Iterator[dict[int, Tensor]]:
    """Zeros added to each module's output, made anew in every forward pass: their gradients are the outputs'."""
    seen: dict[int, Tensor] = {}

    def hook_for(key: int) -> Callable[..., Any]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
            out = first_tensor(output)
            seen[key] = torch.zeros_like(out, requires_grad=True)
            return with_first_tensor(output, out + seen[key])

        return hook

    handles = [module.register_forward_hook(hook_for(key)) for key, module in modules.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


methods.register(
    NAME,
    Method(compute=compute, defaults={"lr": 3e-5}, remembers=False),
    source="arXiv:2505.14679",
    summary="one backward pass and one ridge solve, on features normalised over the stream",
    needs=(SIDE_MEMORY,),
    doc=__doc__,
)
