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

from nmke.attribution.gradient import along_path
from nmke.attribution.parts import read_rows
from nmke.editors.method import Batch, Method, methods
from nmke.editors.pipeline import BatchResult, Stopwatch
from nmke.editors.training import Fit
from nmke.models.load import EditableModel
from nmke.models.tokens import pad_batch
from nmke.models.weights import written_matrix
from nmke.types import EditRequest, LayerUpdate, Mask

TOGETHER = 32  # facts attributed at once
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
        """See `Compute`; each fact has neurons of its own, and the updates are added."""
        clock, model = Stopwatch(), batch.model
        lefts: list[Tensor] = []
        rights: dict[int, list[Tensor]] = {layer: [] for layer in batch.layers}
        with clock.stage("attribution"), batch.progress.task("neurons", total=len(batch.requests)) as task:
            for start in range(0, len(batch.requests), TOGETHER):
                requests = batch.requests[start : start + TOGETHER]
                said = _said(model, requests)
                for request, old, found in zip(
                    requests, said, self._attributed(batch, requests, said), strict=True
                ):
                    lefts.append(self._change(model, request, old))
                    for layer, mask in self.chosen(found).items():
                        rights[layer].append(mask.float())
                task.advance(len(requests))
        left = torch.stack(lefts, dim=1)  # [d_model edits]
        updates = tuple(LayerUpdate(layer, left.clone(), torch.stack(rows)) for layer, rows in rights.items())
        ended = Fit([0.0] * len(lefts), 0).as_targets()
        return BatchResult(updates, {}, ended, {}, tuple(range(len(lefts))), {}, clock.seconds)

    def _attributed(
        self, batch: Batch, requests: Sequence[EditRequest], said: Sequence[int]
    ) -> list[Attributions]:
        """What the neurons did for each old answer, behind every context; one entry per request."""
        count = len(batch.contexts)
        prompts = [
            batch.model.encoder.encode(c + request.text) for request in requests for c in batch.contexts
        ]
        tokens = [old for old in said for _ in range(count)]
        found = integrated_gradients(batch.model, prompts, tokens, batch.layers, self.points)
        split = {layer: scores.split(count) for layer, scores in found.items()}
        return [{layer: parts[i] for layer, parts in split.items()} for i in range(len(requests))]

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
    model: EditableModel,
    prompts: Sequence[Sequence[int]],
    tokens: Sequence[int],
    layers: Sequence[int],
    points: int,
) -> dict[int, Float[Tensor, "prompts d_mlp"]]:
    """Attribution of every neuron to the probability of an answer behind each prompt.

    Args:
        model: The model as it is now.
        prompts: Token ids.
        tokens: The answer's token, per prompt.
        layers: Layers to attribute; the coefficients of one layer are scaled together.
        points: Points of the integral.
    """
    readout = read_rows(model, prompts, layers, targets=torch.tensor(tokens, device=model.device))
    missing = [1 - point / points for point in range(1, points + 1)]
    return {layer: along_path(readout, layer, missing, torch.exp) for layer in layers}


@torch.no_grad()
def _said(model: EditableModel, requests: Sequence[EditRequest]) -> list[int]:
    """The first token of what the model answers to each."""
    ids = [model.encoder.encode(request.text) for request in requests]
    batch = pad_batch(ids, model.encoder.pad_id, device=model.device)
    logits = model.model(**model.inputs(batch)).logits
    return logits[torch.arange(len(ids), device=logits.device), batch.last_index].argmax(dim=1).tolist()


methods.register(
    "kn",
    Method(compute=KnowledgeNeurons(), remembers=False),
    source="arXiv:2104.08696",
    summary="knowledge neurons by integrated gradients, their values turned to the new answer",
    doc=__doc__,
)
