"""The readout of a model, probed from its behaviour: the final norm, and how raw scores become logits.

Nothing is read from a class or an attribute: crafted inputs show what a norm does (Llama's RMSNorm, Gemma's
1 + w form, LayerNorm, OLMo's without parameters), and random inputs of many sizes verify it.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nmke.errors import LayoutError

LOUD = 64.0  # amplitude at which any usual eps vanishes beside the mean square
SIZES = (1e-4, 1e-2, 1.0, 1e2)  # amplitudes of the inputs that verify a probed norm


@dataclass(frozen=True)
class FrozenNorm:
    """A norm as an affine map of its input, once the statistic it divides by is held fixed.

    Args:
        weight: Factor per coordinate, float32 [d_model]; ones where the norm has none.
        bias: Added last, float32 [d_model], or None.
        centered: True for LayerNorm, which subtracts the mean; False for RMSNorm.
        eps: Added to the mean square or variance.
    """

    weight: Float[Tensor, " d_model"]
    bias: Float[Tensor, " d_model"] | None
    centered: bool
    eps: float

    @classmethod
    def probe(cls, norm: nn.Module, d_model: int) -> FrozenNorm:
        """Find a norm's parameters by feeding it crafted inputs; the module is not changed.

        Args:
            norm: The final norm; it takes [batch seq d_model].
            d_model: Width of the residual stream.

        Raises:
            LayoutError: If the module is neither a LayerNorm nor an RMSNorm, up to a factor and a bias.
        """
        exact = copy.deepcopy(norm).float().eval()
        _without_hooks(exact)
        device = next((p.device for p in exact.parameters()), torch.device("cpu"))
        try:
            with torch.inference_mode(False), torch.no_grad():
                found = _fit_norm(exact, d_model, device)
                error = _norm_error(found, exact, d_model, device)
        except LayoutError:
            raise
        except Exception as cause:
            raise LayoutError(
                f"final norm {type(norm).__name__!r} was given [batch seq {d_model}]; found "
                f"{type(cause).__name__}: {cause}; only LayerNorm and RMSNorm are supported"
            ) from cause
        if not error < 1e-3:
            raise LayoutError(
                f"final norm {type(norm).__name__!r} was probed as {'LayerNorm' if found.centered else 'RMSNorm'}; "
                f"found a relative error of {error:.1e} on random input; only LayerNorm and RMSNorm are supported"
            )
        return found

    def scale_at(self, hidden: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch 1"]:
        """What the norm multiplies by at these hidden states: 1 / sqrt(mean square or variance + eps)."""
        hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        if self.centered:
            hidden = hidden - hidden.mean(dim=-1, keepdim=True)
        return (hidden.square().mean(dim=-1, keepdim=True) + self.eps).rsqrt()

    def apply(
        self,
        x: Float[Tensor, "*batch d_model"],
        scale: Float[Tensor, "*batch 1"],
        mean: Float[Tensor, "*batch 1"] | None = None,
    ) -> Float[Tensor, "*batch d_model"]:
        """The norm's output for x with its statistic frozen.

        Args:
            x: Hidden states.
            scale: From `scale_at`, at the unperturbed hidden state.
            mean: The frozen mean; None takes x's own where the norm is centred. An RMSNorm ignores it.
        """
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.centered:
            x = x - (x.mean(dim=-1, keepdim=True) if mean is None else mean)
        y = x * scale * self.weight.to(x)
        return y if self.bias is None else y + self.bias.to(x)


def _without_hooks(module: nn.Module) -> None:
    """Drop the hooks that a copy inherits, so that probing inside a recording leaves no trace in it."""
    for each in module.modules():
        each._forward_hooks.clear()
        each._forward_pre_hooks.clear()


def _fit_norm(norm: nn.Module, d_model: int, device: torch.device) -> FrozenNorm:
    """The parameters that explain the norm's answers to zeros, a constant and alternating signs."""
    signs = torch.ones(d_model, device=device)
    signs[1::2] = -1
    silent = _answer(norm, torch.zeros_like(signs))
    constant = _answer(norm, LOUD * torch.ones_like(signs)) - silent
    loud = _answer(norm, LOUD * signs) - silent
    centered = bool(constant.norm() < 1e-2 * loud.norm())
    bias = silent if silent.any() else None
    unit = FrozenNorm(weight=torch.ones_like(signs), bias=None, centered=centered, eps=0.0)
    weight = loud / unit.apply(LOUD * signs, unit.scale_at(LOUD * signs))
    strongest = weight.abs().argmax()
    if not weight[strongest].isfinite() or weight[strongest] == 0:
        raise LayoutError(
            "the final norm's weight is zero or not finite; found nothing to probe, check the weights"
        )
    eps, nearest = 0.0, 1.0
    for size in (10.0**-power for power in range(7)):
        # The share of its full answer that the norm gives at this size: size / sqrt(size^2 + eps).
        full = weight[strongest] * unit.apply(size * signs, unit.scale_at(size * signs))[strongest]
        share = float((_answer(norm, size * signs) - silent)[strongest] / full)
        if 0 < share < 1 - 1e-5 and abs(share - 0.6) < nearest:
            variance = float(unit.scale_at(size * signs)) ** -2
            eps, nearest = variance * (share**-2 - 1), abs(share - 0.6)
    return FrozenNorm(weight=weight, bias=bias, centered=centered, eps=eps)


def _answer(norm: nn.Module, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
    """The norm's output for x, given as [batch seq d_model]."""
    return norm(x.reshape(1, -1, x.shape[-1])).float().reshape(x.shape)


def _norm_error(found: FrozenNorm, norm: nn.Module, d_model: int, device: torch.device) -> float:
    """Largest relative difference between the probed norm and the module, over inputs of many sizes."""
    generator = torch.Generator().manual_seed(0)
    errors = []
    for size in SIZES:
        x = size * (torch.randn(4, d_model, generator=generator) + 0.5).to(device)
        expected = _answer(norm, x)
        errors.append(float((found.apply(x, found.scale_at(x)) - expected).norm() / expected.norm()))
    return max(errors)


@dataclass(frozen=True)
class LogitMap:
    """What the model does to the unembedding's output: logits = softcap * tanh(scale * raw / softcap).

    Args:
        scale: Factor on the raw scores; 1 for most models.
        softcap: Bound on the logits, or None when there is none.
    """

    scale: float = 1.0
    softcap: float | None = None

    def apply(self, raw: Float[Tensor, "*batch d_vocab"]) -> Float[Tensor, "*batch d_vocab"]:
        """The logits of raw scores."""
        scaled = raw if self.scale == 1.0 else raw * self.scale
        if self.softcap is None:
            return scaled
        return self.softcap * torch.tanh(scaled / self.softcap)


def crafted_scores(like: Float[Tensor, "*batch d_vocab"]) -> Float[Tensor, "*batch d_vocab"]:
    """Raw scores of either sign from 1e-1 to 1e3 in size, row by row, shaped as the tensor given."""
    span = torch.linspace(-1, 1, like.shape[-1], dtype=torch.float64)
    sizes = torch.logspace(-1, 3, like[..., 0].numel(), dtype=torch.float64)
    return (sizes[:, None] * span).to(like).reshape(like.shape)


def fit_logit_map(raw: Float[Tensor, "*batch d_vocab"], logits: Float[Tensor, "*batch d_logits"]) -> LogitMap:
    """Find the map that took crafted raw scores to logits.

    Args:
        raw: `crafted_scores`, put in place of the unembedding's output.
        logits: What the model made of them.

    Returns:
        A map that reproduces every given logit, up to rounding.

    Raises:
        LayoutError: If the map is not a factor, with or without a tanh bound.
    """
    if raw.shape != logits.shape:
        raise LayoutError(
            f"{raw.shape[-1]} scores of the unembedding become {logits.shape[-1]} logits; "
            "only models that keep one logit per score are supported"
        )
    asked, found = raw.detach().double().flatten(), logits.detach().double().flatten()
    asked, found = asked[asked != 0], found[asked != 0]
    tolerance = max(8 * torch.finfo(raw.dtype).eps, 1e-5)
    top = float(found.abs().max())
    inner = found.abs() < 0.5 * top
    slopes = {None: found / asked, top: top * torch.atanh(found[inner] / top) / asked[inner]}
    for softcap, slope in slopes.items():
        scale = float(slope.median())
        scale = 1.0 if abs(scale - 1) < tolerance else scale
        candidate = LogitMap(scale=scale, softcap=softcap)
        if torch.allclose(candidate.apply(asked), found, rtol=tolerance, atol=1e-6):
            return candidate
    raise LayoutError(
        f"the unembedding's scores of up to {float(asked.abs().max()):.0f} become logits of up to {top:.3g}; found "
        "neither a constant factor nor a tanh bound, other maps are not supported"
    )
