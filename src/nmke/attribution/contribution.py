"""What each neuron writes for or against the answer: its signed share of the answer's logit.

Source: direct logit attribution (Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits").
c_i·s·(w_norm ⊙ v_i)·(U_y - mean_v U_v), the norm's statistic s frozen: positive where the neuron holds up the
answer y, negative where it holds against it. With y the model's own guess this is its part in the old answer,
which an edit has to change. Before a soft cap, where the model has one.
"""

from __future__ import annotations

import torch

from nmke.attribution.base import Readout, neuron_scores
from nmke.attribution.logits import wide
from nmke.models.norms import FrozenNorm
from nmke.models.weights import DownProjection, written_matrix
from nmke.types import Scores


@torch.no_grad()
def contribution(readout: Readout, layer: int, amplification: float) -> Scores:
    """Logits above the mean token's, [prompts, d_mlp]; amplification does not enter."""
    layout = readout.layout
    norm = FrozenNorm.probe(layout.final_norm, layout.d_model)
    write, coefficients = readout.writes[layer], readout.coefficients[layer]
    unembedding = wide(written_matrix(layout.unembedding))
    toward = unembedding[readout.targets] - unembedding.mean(dim=0)  # [prompts, d_model]
    toward = toward * norm.weight.to(toward)
    if norm.centered:  # a LayerNorm takes the write's mean away
        toward = toward - toward.mean(dim=1, keepdim=True)
    scale = layout.logit_map.scale * norm.scale_at(readout.finals) * write.factors[:, None]
    values = wide(DownProjection(layout.layers[layer].down_proj).read())
    return coefficients * scale * (toward * write.weight @ values)


neuron_scores.register(
    "contribution",
    contribution,
    source="Elhage et al. 2021",
    summary="signed share of the answer's logit, without the rest of the network",
)
