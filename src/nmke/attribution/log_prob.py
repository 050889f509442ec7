"""Log-probability and probability increase of one neuron's amplified write, in the exact linear form.

Source: NMKE, arXiv:2510.22139, sec. 3.2: S[b,i] = log p(y | f(x + a·c_i·v_i)) - log p(y | f(x)), where f is
unembedding after the final norm with the norm's statistic frozen at that of the unperturbed final hidden
state; x is the residual stream after attention and before the MLP. PSA is the same in probabilities.
Differs: since the norm is frozen, logits are linear in the perturbation: f(x) + a·c_i·s·g_i with
g_i = (w_norm ⊙ v_i) Uᵀ the same for every prompt. So one product [neurons, d_model] x [d_model, d_vocab]
serves all prompts, and each score is one log-sum-exp over the vocabulary; [prompts, neurons, d_vocab] never
exists. The released code makes that product per prompt. On CUDA product and log-sum-exp are one kernel
(`nmke.attribution.fused`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy
import torch
from jaxtyping import Float
from torch import Tensor

from nmke.attribution.base import Readout, neuron_scores
from nmke.attribution.fused import log_totals, runs_fused
from nmke.attribution.logits import raw_logits
from nmke.models.norms import FrozenNorm
from nmke.models.weights import DownProjection, written_matrix
from nmke.types import Scores

CHUNK_FLOATS = 1 << 23  # slopes held at once
SERIES_BOUNDS = (0.5, 2.0)  # where |step·slope| stays below one of these, exp is summed by its series
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
        weight = norm.weight.to(base) * write.weight
        capped = layout.logit_map.softcap is not None
        if not capped and runs_fused(written_matrix(layout.unembedding)):
            after = _fused(readout, layer, weight, base, steps)
        else:
            shifted = _capped if capped else _linear
            slopes = _slopes(readout, layer, weight)
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
    unembedding = written_matrix(layout.unembedding)
    size = max(1, CHUNK_FLOATS // layout.d_vocab)
    for start in range(0, len(values), size):
        at = slice(start, min(start + size, len(values)))
        rows = (values[at].to(weight) * weight).to(unembedding.dtype)
        yield (rows @ unembedding.T).to(weight), at


def _linear(readout: Readout, base: Tensor, slope: Tensor, steps: Tensor) -> Float[Tensor, "prompts neurons"]:
    """Log p(target) with each neuron's step added: step·slope_target - log Σ_v p_v exp(step·slope_v)."""
    factor = readout.layout.logit_map.scale
    log_p = torch.log_softmax(base * factor, dim=1)
    probabilities, steps = log_p.exp(), steps * factor
    bound = steps.abs().amax(dim=0) * torch.maximum(slope.amax(dim=1), -slope.amin(dim=1))
    log_total, left = torch.empty_like(steps), torch.ones_like(bound, dtype=torch.bool)
    for limit in SERIES_BOUNDS if slope.dtype == torch.float32 else ():
        near = left & (bound <= limit)
        left &= ~near
        if bool(near.any()):
            log_total[:, near] = _by_series(probabilities, slope[near], steps[:, near], limit)
    if bool(left.any()):
        log_total[:, left] = _by_exponential(probabilities, slope[left], steps[:, left])
    target = slope[:, readout.targets].T * steps
    return log_p.gather(1, readout.targets[:, None]) + target - log_total


def _fused(
    readout: Readout, layer: int, weight: Tensor, base: Tensor, steps: Tensor
) -> Float[Tensor, "prompts d_mlp"]:
    """The same for all neurons at once, by `log_totals`."""
    layout = readout.layout
    unembedding = written_matrix(layout.unembedding)
    log_p, steps = torch.log_softmax(base * layout.logit_map.scale, dim=1), steps * layout.logit_map.scale
    rows = DownProjection(layout.layers[layer].down_proj).read().T.to(weight) * weight
    target = (unembedding[readout.targets].to(rows) @ rows.T) * steps
    log_total = log_totals(log_p, rows.to(unembedding.dtype), unembedding, steps)
    return log_p.gather(1, readout.targets[:, None]) + target - log_total


def _by_series(
    probabilities: Float[Tensor, "prompts d_vocab"],
    slope: Float[Tensor, "neurons d_vocab"],
    steps: Float[Tensor, "prompts neurons"],
    bound: float,
) -> Float[Tensor, "prompts neurons"]:
    """Log Σ_v p_v exp(step·slope_v) where |step·slope| <= `bound`, by a Chebyshev series of exp.

    Each power of the slopes is formed once for all prompts and averaged over the vocabulary by a matrix
    product, so the exponentials of [prompts, neurons, d_vocab] are never taken. Error below 1e-5 nats.
    """
    reach = torch.maximum(slope.amax(dim=1), -slope.amin(dim=1)).clamp(min=1e-30)
    unit = slope / reach[:, None]
    scale = steps * reach / bound  # |scale| <= 1
    coefficients = _exponential_series(bound)
    power, total = unit.clone(), torch.full_like(steps, coefficients[0])
    for degree, coefficient in enumerate(coefficients[1:], start=1):
        if degree > 1:
            power.mul_(unit)
        total += coefficient * scale**degree * (probabilities @ power.T)
    return total.log()


@cache
def _exponential_series(bound: float) -> tuple[float, ...]:
    """Coefficients a_k of Σ a_k u^k, within 5e-7 of exp(bound · u) for |u| <= 1."""
    nodes = numpy.cos((numpy.arange(64) + 0.5) * numpy.pi / 64)
    for degree in range(2, 16):
        fitted = numpy.polynomial.chebyshev.chebfit(nodes, numpy.exp(bound * nodes), degree)
        series = numpy.polynomial.chebyshev.cheb2poly(fitted)
        if (
            numpy.abs(numpy.polynomial.polynomial.polyval(nodes, series) - numpy.exp(bound * nodes)).max()
            < 5e-7
        ):
            break
    return tuple(float(value) for value in series)


def _by_exponential(
    probabilities: Float[Tensor, "prompts d_vocab"],
    slope: Float[Tensor, "neurons d_vocab"],
    steps: Float[Tensor, "prompts neurons"],
) -> Float[Tensor, "prompts neurons"]:
    """Log Σ_v p_v exp(step·slope_v), one exponential each, in place on one [neurons, d_vocab] buffer."""
    highest, lowest = slope.amax(dim=1), slope.amin(dim=1)
    out, buffer = torch.empty_like(steps), torch.empty_like(slope)
    for prompt, step in enumerate(steps):
        shift = torch.maximum(step * highest, step * lowest)
        torch.mul(slope, step[:, None], out=buffer)
        out[prompt] = (buffer.sub_(shift[:, None]).exp_() @ probabilities[prompt]).log() + shift
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
