"""The slow truth: what the answer's log-probability loses when one neuron is silent at the scored token.

log p(y) - log p(y | c_i = 0), one run of the rest of the network per prompt and neuron. Removing c_i is the
same as adding -c_i·v_i to the down-projection's output, so the runs share everything before the layer.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nmke.attribution.base import Readout, neuron_scores
from nmke.attribution.logits import wide
from nmke.models.weights import DownProjection
from nmke.types import Scores

TOKENS_AT_ONCE = 256


def ablation(readout: Readout, layer: int, amplification: float) -> Scores:
    """Nats lost without each neuron, [prompts, d_mlp]; amplification does not enter."""
    every = torch.arange(readout.layout.layers[layer].d_mlp)
    return ablate(readout, layer, every)


@torch.no_grad()
def ablate(readout: Readout, layer: int, neurons: Int[Tensor, " chosen"]) -> Float[Tensor, "prompts chosen"]:
    """Nats that the answer loses when one of the chosen neurons is silent at the scored token.

    Args:
        readout: What the prompts left behind.
        layer: The neurons' layer.
        neurons: Which of them; the cost is one run per prompt and neuron.
    """
    coefficients = readout.coefficients[layer]
    neurons = neurons.to(coefficients.device)
    values = wide(DownProjection(readout.layout.layers[layer].down_proj).read())[:, neurons].T
    out = torch.empty(len(coefficients), len(neurons), dtype=coefficients.dtype, device=coefficients.device)
    for prompt, tail in enumerate(readout.rerun.rows.tail_lengths):
        writes = coefficients[prompt, neurons][:, None] * values  # [chosen, d_model]
        alone = readout.rerun.open([prompt], [layer])
        before = alone.log_probs({layer: torch.zeros_like(writes[:1])})
        size = min(len(neurons), max(1, TOKENS_AT_ONCE // tail))
        many = alone.repeated(size)
        for start in range(0, len(neurons), size):
            part = writes[start : start + size]
            filled = torch.cat([part, part.new_zeros(size - len(part), part.shape[1])])
            after = many.log_probs({layer: -filled})[: len(part)]
            out[prompt, start : start + size] = (before - after).to(out)
    return out


neuron_scores.register(
    "ablation",
    ablation,
    source="direct measurement",
    summary="log-probability lost when the neuron is silent: one run per prompt and neuron, slow",
)
