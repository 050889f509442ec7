"""Tiny models that compute in float64 throughout, so that two ways to the same number differ by rounding only."""

from collections.abc import Callable

import torch
from nmke.models.load import EditableModel
from tests import tiny
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast


class ExactRms(nn.Module):
    """RMSNorm in its input's own type; transformers' classes round to float32 inside."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.weight = norm.weight
        self.eps = float(getattr(norm, "variance_epsilon", None) or norm.eps)
        self.offset = 1.0 if "Gemma" in type(norm).__name__ else 0.0

    def forward(self, hidden: Tensor) -> Tensor:
        return (self.offset + self.weight) * hidden * (hidden.square().mean(-1, keepdim=True) + self.eps).rsqrt()


def exact(
    builder: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerFast | None = None, **changes: object
) -> EditableModel:
    """One of `tiny`'s models with that tokenizer, in float64."""
    tokenizer = tokenizer or tiny.tiny_tokenizer()
    model = builder(**{"vocab_size": len(tokenizer), **changes}).double()
    for path, module in list(model.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, ExactRms(module))
    return EditableModel.wrap(model, tokenizer)
