"""Log-probability and probability increase of one neuron's amplified write, in the exact linear form.

Source: NMKE, arXiv:2510.22139, sec. 3.2: S[b,i] = log p(y | f(x + a·c_i·v_i)) - log p(y | f(x)), where f is
unembedding after the final norm with the norm's statistic frozen at that of the unperturbed final hidden
state; x is the residual stream after attention and before the MLP. PSA is the same in probabilities.
Differs: since the norm is frozen, logits are linear in the perturbation: f(x) + a·c_i·s·g_i with
g_i = (w_norm ⊙ v_i) Uᵀ the same for every prompt. So one product [neurons, d_model] x [d_model, d_vocab]
serves all prompts, and each score is one log-sum-exp over the vocabulary; [prompts, neurons, d_vocab] never
exists. The released code makes that product per prompt.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from nmke.attribution.base import Readout, neuron_scores, raw_logits
from nmke.models.norms import FrozenNorm
from nmke.models.weights import DownProjection
from nmke.types import Scores

CHUNK_FLOATS = 1 << 20  # logits held at once: small enough to stay in a CPU's cache
SMALLEST, LARGEST = 1e-8, 1 - 1e-8  # probabilities are clamped to this range


@dataclass(frozen=True)
class ProbabilityIncrease:
    """LPS ("log", nats) or PSA ("linear", probability)."""

    scale: Literal["log", "linear"]

    @torch.no_grad()
    def __call__(self, readout: Readout, layer: int, amplification: float) -> Scores:
        """See `NeuronScore`."""
        layout = readout.layout
        norm = FrozenNorm.probe(layout.final_norm, layout.d_model)
        statistic = norm.scale_at(readout.finals)
        mean = readout.finals.mean(dim=1, keepdim=True) if norm.centered else None
        base = raw_logits(layout, norm.apply(readout.middles[layer], statistic, mean))
        write = readout.writes[layer]
        steps = amplification * readout.coefficients[layer] * statistic * write.factors[:, None]
        slopes = _slopes(readout, layer, norm.weight.to(base) * write.weight)
        shifted = _capped if layout.logit_map.softcap is not None else _linear
        after = torch.cat([shifted(readout, base, slope, steps[:, at]) for slope, at in slopes], dim=1)
        logits = layout.logit_map.apply(base)
        before = torch.log_softmax(logits, dim=1).gather(1, readout.targets[:, None])
        before, after = _clamped(before), _clamped(after)
        return after - before if self.scale == "log" else after.exp() - before.exp()


def _slopes(
    readout: Readout, layer: int, weight: Float[Tensor, " d_model"]
) -> Iterator[tuple[Tensor, slice]]:
    """D raw logits / d step of each neuron, in chunks [neurons, d_vocab], the same for every prompt."""
    layout = readout.layout
    values = DownProjection(layout.layers[layer].down_proj).read().T
    unembedding = layout.unembedding.weight
    size = max(1, CHUNK_FLOATS // layout.d_vocab)
    for start in range(0, len(values), size):
        at = slice(start, min(start + size, len(values)))
        rows = (values[at].to(weight) * weight).to(unembedding.dtype)
        yield (rows @ unembedding.T).to(weight), at


def _linear(readout: Readout, base: Tensor, slope: Tensor, steps: Tensor) -> Float[Tensor, "prompts neurons"]:
    """Log p(target) with each neuron's step added.

    One log-sum-exp per prompt and neuron, as log Σ_v p_v exp(step·slope_v), in place on one buffer.
    """
    factor = readout.layout.logit_map.scale
    probabilities = torch.softmax(base * factor, dim=1)
    log_target = torch.log_softmax(base * factor, dim=1).gather(1, readout.targets[:, None])[:, 0]
    highest, lowest = slope.amax(dim=1), slope.amin(dim=1)
    out = torch.empty(len(base), len(slope), dtype=base.dtype, device=base.device)
    buffer = torch.empty_like(slope)
    for prompt in range(len(base)):
        step = steps[prompt] * factor
        shift = torch.maximum(step * highest, step * lowest)
        torch.mul(slope, step[:, None], out=buffer)
        total = buffer.sub_(shift[:, None]).exp_() @ probabilities[prompt]
        target = step * slope[:, readout.targets[prompt]]
        out[prompt] = log_target[prompt] + target - shift - total.log()
    return out


def _capped(readout: Readout, base: Tensor, slope: Tensor, steps: Tensor) -> Float[Tensor, "prompts neurons"]:
    """The same where a soft cap stands behind the unembedding, so that logits are not linear."""
    rows = []
    for prompt, target in enumerate(readout.targets.tolist()):
        logits = readout.layout.logit_map.apply(base[prompt] + slope * steps[prompt][:, None])
        rows.append(logits[:, target] - logits.logsumexp(dim=1))
    return torch.stack(rows)


def _clamped(log_probability: Tensor) -> Tensor:
    low, high = torch.log(torch.tensor([SMALLEST, LARGEST], dtype=torch.float64)).tolist()
    return log_probability.clamp(low, high)


neuron_scores.register(
    "lps",
    ProbabilityIncrease("log"),
    source="arXiv:2510.22139",
    summary="log-probability increase of the amplified write",
)
neuron_scores.register(
    "psa",
    ProbabilityIncrease("linear"),
    source="arXiv:2510.22139",
    summary="probability increase of the amplified write",
)
