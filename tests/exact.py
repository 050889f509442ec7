"""Tiny models that compute in float64 throughout, so that two ways to the same number differ by rounding only."""

from collections.abc import Callable

import torch
from tests import tiny
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from nmke.models.load import EditableModel


class ExactRms(nn.Module):
    """RMSNorm in its input's own type; transformers' classes round to float32 inside."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.weight = norm.weight
        self.eps = float(getattr(norm, "variance_epsilon", None) or norm.eps)
        self.offset = 1.0 if "Gemma" in type(norm).__name__ else 0.0

    def forward(self, hidden: Tensor) -> Tensor:
        return (
            (self.offset + self.weight) * hidden * (hidden.square().mean(-1, keepdim=True) + self.eps).rsqrt()
        )


def exact(
    builder: Callable[..., PreTrainedModel],
    tokenizer: PreTrainedTokenizerFast | None = None,
    gain: float = 8.0,
    **changes: object,
) -> EditableModel:
    """One of `tiny`'s models with that tokenizer, in float64 (its eager attention rounds to float32, SDPA not).

    Args:
        builder: From `tiny`.
        tokenizer: Defaults to `tiny_tokenizer()`.
        gain: Factor on the weight matrices, whose initial 0.02 leaves every answer a coin toss.
        changes: Configuration values.
    """
    tokenizer = tokenizer or tiny.tiny_tokenizer()
    model = builder(**{"vocab_size": len(tokenizer), **changes}).double()
    model.config._attn_implementation = "sdpa"  # not through the setter, which refuses Gemma 2's soft cap
    for path, module in list(model.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, ExactRms(module))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(gain)
    return EditableModel.wrap(model, tokenizer)
