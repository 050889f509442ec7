"""First-order effect of each neuron on the answer, through the rest of the network.

`gradient`: c_i · ∂log p(y)/∂c_i (Shrikumar et al. 2016, arXiv:1605.01713). `integrated`: the same gradient
averaged while the layer's coefficients at the scored token grow from 0 to what they are (integrated gradients,
Sundararajan et al. 2017, arXiv:1703.01365), so that the scores of a layer add up to the log-probability that
the layer gives the answer there.
Differs: Dai et al. 2022 (knowledge neurons, arXiv:2104.08696) integrate the probability by 20 left Riemann
steps; here it is the log-probability, by the midpoint rule. The answer is read at the last token, also where
the neurons are scored at the subject's. Behind a norm (Gemma 2 and 3) nearly all of the path lies at its very
beginning, which the midpoints miss: the scores there do not add up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from nmke.attribution.base import Readout, neuron_scores
from nmke.attribution.logits import wide
from nmke.models.weights import DownProjection
from nmke.types import Scores

STEPS = 10  # midpoints of the path


@torch.no_grad()
def gradient_times_activation(readout: Readout, layer: int, amplification: float) -> Scores:
    """Nats, to first order, that the answer would lose without the neuron; amplification does not enter."""
    values = wide(DownProjection(readout.layout.layers[layer].down_proj).read())
    gradients = wide(readout.gradients[layer])
    return readout.coefficients[layer] * (gradients @ values)


def integrated_gradients(readout: Readout, layer: int, amplification: float) -> Scores:
    """The neuron's share of what the whole layer gives the answer, nats; amplification does not enter."""
    return along_path(readout, layer, [1 - (step + 0.5) / STEPS for step in range(STEPS)])


@torch.no_grad()
def along_path(
    readout: Readout,
    layer: int,
    missing: Sequence[float],
    of: Callable[[Tensor], Tensor] = lambda log_p: log_p,
) -> Scores:
    """Coefficients times the mean gradient while a part of all of them is missing, [prompts, d_mlp].

    Args:
        readout: The prompts.
        layer: Whose coefficients are scaled together.
        missing: The part that is missing at each point of the path.
        of: What is differentiated, a function of the answer's log-probability.
    """
    values = wide(DownProjection(readout.layout.layers[layer].down_proj).read())
    coefficients = readout.coefficients[layer]
    written = coefficients @ values.T  # [prompts, d_model]
    total = torch.zeros_like(written)
    for prompts in readout.rerun.buckets():
        opened = readout.rerun.open(prompts, [layer])
        for part in missing:
            total[prompts] += wide(opened.gradients({layer: -part * written[prompts]}, of)[layer])
    return coefficients * ((total / len(missing)) @ values)


neuron_scores.register(
    "gradient",
    gradient_times_activation,
    source="arXiv:1605.01713",
    summary="gradient x activation: first-order effect on the answer",
)
neuron_scores.register(
    "integrated",
    integrated_gradients,
    source="arXiv:1703.01365",
    summary="integrated gradients: the neuron's share of its layer's effect on the answer",
)
