"""KN: find the neurons that hold the old answer by integrated gradients, and turn their values to the new one.

Source: Dai et al. 2021, arXiv:2104.08696: Attr(w) = w̄/m Σ_{k=1..m} ∂P(answer | k/m · w̄)/∂w, over the coefficients of
a layer scaled together, at the token that predicts the answer; neurons above t = 0.2 of the largest attribution, in
at least a share p of the prompts, are kept; their values become v − λ₁·e(old) + λ₂·e(new) with λ₁ = 1, λ₂ = 8, e the
answer's embedding.
Differs: prompts are the fact's own prompt behind each context (a fact here has no set of paraphrases); p = 0.5. The
old answer is what the model says, by its first token; e is the unembedding's row. Layers are the edited ones, not
all, and share one largest attribution. If no neuron reaches p, those that come closest are taken.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from nmke.attribution.base import wide
from nmke.editors.method import Batch, Method, methods
from nmke.editors.pipeline import BatchResult, Stopwatch
from nmke.editors.training import Fit
from nmke.models.load import EditableModel
from nmke.models.replay import in_rows
from nmke.models.tokens import pad_batch
from nmke.models.tracing import record_inputs, stop_after
from nmke.models.weights import written_matrix
from nmke.types import EditRequest, LayerUpdate, Mask

Attributions = Mapping[int, Float[Tensor, "prompts d_mlp"]]


@dataclass(frozen=True)
class KnowledgeNeurons:
    """Locates neurons by integrated gradients and rewrites their values.

    Args:
        points: m, points of the integral.
        threshold: t, share of the largest attribution that counts.
        agreement: p, share of the prompts in which a neuron must count.
        erase, write: λ₁ and λ₂.
    """

    points: int = 20
    threshold: float = 0.2
    agreement: float = 0.5
    erase: float = 1.0
    write: float = 8.0

    def __call__(self, batch: Batch) -> BatchResult:
        """See `Compute`; the facts are edited one by one and their updates added."""
        clock, model = Stopwatch(), batch.model
        lefts: list[Tensor] = []
        rights: dict[int, list[Tensor]] = {layer: [] for layer in batch.layers}
        with clock.stage("attribution"), batch.progress.task("neurons", total=len(batch.requests)) as task:
            for request in batch.requests:
                prompts = [model.encoder.encode(context + request.text) for context in batch.contexts]
                old = _said(model, prompts[0])
                chosen = self.chosen(integrated_gradients(model, prompts, old, batch.layers, self.points))
                lefts.append(self._change(model, request, old))
                for layer, mask in chosen.items():
                    rights[layer].append(mask.float())
                task.advance()
        left = torch.stack(lefts, dim=1)  # [d_model edits]
        updates = tuple(LayerUpdate(layer, left.clone(), torch.stack(rows)) for layer, rows in rights.items())
        ended = Fit([0.0] * len(lefts), 0).as_targets()
        return BatchResult(updates, {}, ended, {}, tuple(range(len(lefts))), {}, clock.seconds)

    def chosen(self, attributions: Attributions) -> dict[int, Mask]:
        """The knowledge neurons of each layer; if none reaches the agreement, those that come closest."""
        largest = torch.stack([a.amax(dim=1) for a in attributions.values()]).amax(dim=0)  # [prompts]
        limit = (self.threshold * largest).clamp(min=0)[:, None]
        agreed = {layer: (scores > limit).double().mean(dim=0) for layer, scores in attributions.items()}
        most = max(float(share.max()) for share in agreed.values())
        needed = min(self.agreement, most)
        return {layer: (share >= needed) & (share > 0) for layer, share in agreed.items()}

    def _change(self, model: EditableModel, request: EditRequest, old: int) -> Tensor:
        new = model.encoder.encode_target(request.text, request.target_new)[0]
        rows = written_matrix(model.layout.unembedding).float()
        return self.write * rows[new] - self.erase * rows[old]


def integrated_gradients(
    model: EditableModel, prompts: Sequence[Sequence[int]], token: int, layers: Sequence[int], points: int
) -> dict[int, Float[Tensor, "prompts d_mlp"]]:
    """Attribution of every neuron to the probability of `token` behind each prompt.

    Args:
        model: The model as it is now.
        prompts: Token ids.
        token: The answer's token.
        layers: Layers to attribute; the coefficients of one layer are scaled together.
        points: Points of the integral.
    """
    found: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    for prompt in prompts:
        batch = pad_batch([list(prompt)] * points, model.encoder.pad_id, device=model.device)
        for layer in layers:
            found[layer].append(_attribution(model, model.inputs(batch), layer, token, points))
    return {layer: torch.stack(rows) for layer, rows in found.items()}


def _attribution(
    model: EditableModel, inputs: dict[str, object], layer: int, token: int, points: int
) -> Float[Tensor, " d_mlp"]:
    layout = model.layout
    scale = torch.arange(1, points + 1, device=model.device) / points
    kept: list[Tensor] = []

    def scaled(_module: object, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        rows = in_rows(args[0], points)
        kept.append((rows[:, -1] * scale[:, None].to(rows)).detach().requires_grad_())
        kept.append(rows[0, -1].detach())
        changed = torch.cat([rows[:, :-1], kept[0][:, None]], dim=1)
        return (changed.reshape(args[0].shape), *args[1:])

    handle = layout.layers[layer].down_proj.register_forward_pre_hook(scaled)
    try:
        with record_inputs({"norm": layout.final_norm}) as seen, stop_after(layout.final_norm):
            model.model(**inputs)
    finally:
        handle.remove()
    hidden = in_rows(seen["norm"], points)[:, -1]
    logits = layout.logit_map.apply(layout.unembedding(layout.final_norm(hidden)))
    probability = torch.softmax(wide(logits), dim=1)[:, token].sum()
    (gradient,) = torch.autograd.grad(probability, kept[0])
    return wide(kept[1]) * wide(gradient).mean(dim=0)


@torch.no_grad()
def _said(model: EditableModel, prompt: Sequence[int]) -> int:
    """The first token of what the model answers."""
    batch = pad_batch([list(prompt)], model.encoder.pad_id, device=model.device)
    return int(model.model(**model.inputs(batch)).logits[0, -1].argmax())


methods.register(
    "kn",
    Method(compute=KnowledgeNeurons(), remembers=False),
    source="arXiv:2104.08696",
    summary="knowledge neurons by integrated gradients, their values turned to the new answer",
    doc=__doc__,
)
