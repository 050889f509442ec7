"""FT and FT-L: fine-tune one down-projection on the facts, free or within a box.

Source: Zhu et al. 2020, arXiv:2012.00363, as ROME (arXiv:2202.05262, sec. 3.3) runs it: Adam on the weights of one
MLP layer, minimising −log p(answer | prompt), stopped early; FT-L holds every entry of ΔW in [−ε, ε] (L∞) by
projecting after each step.
Differs: only the down-projection is tuned, on all facts of a batch at once, on the bare prompt. The box is around
the weights before the batch. ε = 5e-4; 5e-4 is also the learning rate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from nmke.editors.method import Batch, Method, methods
from nmke.editors.pipeline import BatchResult, Stopwatch
from nmke.editors.training import added_to_output, answer_rows, edit_losses, fit, trainable_type
from nmke.models.weights import DownProjection
from nmke.types import LayerUpdate


@dataclass(frozen=True)
class FineTune:
    """Adam on the down-projections of the edited layers.

    Args:
        largest: Bound of every entry of ΔW, None for none.
    """

    largest: float | None = None

    def __call__(self, batch: Batch) -> BatchResult:
        """See `Compute`."""
        clock, model = Stopwatch(), batch.model
        parts = {i: model.layout.layers[i].down_proj for i in batch.layers}
        deltas = {
            i: torch.zeros(
                DownProjection(part).shape,
                dtype=trainable_type(model),
                device=model.device,
                requires_grad=True,
            )
            for i, part in parts.items()
        }
        changes = {parts[i]: _times(delta) for i, delta in deltas.items()}
        optimizer = torch.optim.Adam(list(deltas.values()), lr=batch.config.lr)
        with clock.stage("training"), added_to_output(changes):
            groups = answer_rows(model, batch.requests)
            names = [request.id for request in batch.requests]
            ended = fit(
                groups,
                partial(edit_losses, model),
                optimizer,
                batch.config,
                names,
                after_step=lambda: self._project(deltas.values()),
            )
        updates = tuple(_dense(layer, delta.detach()) for layer, delta in deltas.items())
        owners = tuple(range(len(batch.requests)))
        return BatchResult(updates, {}, ended.as_targets(), {}, owners, {}, clock.seconds)

    @torch.no_grad()
    def _project(self, deltas: Iterable[Tensor]) -> None:
        if self.largest is not None:
            for delta in deltas:
                delta.clamp_(-self.largest, self.largest)


def _times(delta: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda seen: seen.to(delta.dtype) @ delta.T


def _dense(layer: int, delta: Tensor) -> LayerUpdate:
    return LayerUpdate(layer, torch.eye(len(delta), device=delta.device), delta.float().contiguous())


DEFAULTS = {"lr": 5e-4, "steps": 25, "stop_loss": 1e-2}
methods.register(
    "ft",
    Method(compute=FineTune(), defaults=DEFAULTS, max_layers=1, remembers=False),
    source="arXiv:2202.05262, sec. 3.3",
    summary="fine-tuning of one down-projection",
    doc=__doc__,
)
methods.register(
    "ft-l",
    Method(compute=FineTune(largest=5e-4), defaults=DEFAULTS, max_layers=1, remembers=False),
    source="arXiv:2012.00363",
    summary="fine-tuning of one down-projection, every entry within ±5e-4 of what it was",
    doc=__doc__,
)
