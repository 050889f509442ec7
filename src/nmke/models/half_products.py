"""Decoder blocks whose matrix products run in bfloat16, for a processor that does these much faster.

Only the products change: weights and inputs of linear layers are rounded to bfloat16, sums are taken in
float32 by the processor, and what comes out is float32 again. The residual stream, norms, attention, losses
and the vectors that are optimised stay in float32. The blocks are copies; the model is not touched.
"""

from __future__ import annotations

import copy
import logging
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from nmke.models.layout import LayerParts, ModelLayout
from nmke.models.load import EditableModel
from nmke.models.replay import replay_agrees

logger = logging.getLogger(__name__)

Products = Literal["auto", "float32", "bfloat16"]
TOLERANCE = (
    0.2  # of the largest hidden state: rounding alone reaches .06 at a first token, broken copies reach 1
)
SMALLEST_WIDTH = 256  # d_model below which casting costs what the products save


def half_product_layout(model: EditableModel, products: Products, first: int) -> ModelLayout | None:
    """The layout to replay in place of the model's own, or None where float32 products are to be used.

    Args:
        model: The model as it is now; copies are made of its present weights.
        products: "float32", "bfloat16", or "auto" for whichever `pays_off`.
        first: The first block that will be replayed.
    """
    if products == "float32" or (products == "auto" and not pays_off(model)):
        return None
    layout = with_half_products(model.layout, first)
    if model.half_products is None:
        model.half_products = replay_agrees(model, TOLERANCE, layout)
        if not model.half_products:
            logger.warning("products stay in %s: the blocks do not run on bfloat16 copies", model.dtype)
    return layout if model.half_products else None


def pays_off(model: EditableModel) -> bool:
    """Whether this model's products are faster in bfloat16 on this processor, at float32 sums."""
    return (
        model.dtype == torch.float32
        and model.device.type == "cpu"
        and model.layout.d_model >= SMALLEST_WIDTH
        and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    )


class HalfLinear(nn.Module):
    """A linear layer that multiplies in bfloat16 and answers in the type of its input.

    Args:
        weight: [out, in], of any float type.
        bias: [out] or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().to(torch.bfloat16), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        out = nn.functional.linear(hidden.to(torch.bfloat16), self.weight).to(hidden.dtype)
        return out if self.bias is None else out + self.bias


def with_half_products(layout: ModelLayout, first: int) -> ModelLayout:
    """The layout with the blocks from `first` on replaced by copies that multiply in bfloat16."""
    twins = tuple(_twin(parts) if parts.index >= first else parts for parts in layout.layers)
    return replace(layout, layers=twins)


def _twin(parts: LayerParts) -> LayerParts:
    names = {module: name for name, module in parts.block.named_modules()}
    linear = [module for module in names if type(module) in (nn.Linear, Conv1D)]
    copies = {id(module): _half(module) for module in linear}
    block = copy.deepcopy(parts.block, dict(copies))  # the memo: a linear layer's copy is its half
    mlp, down_proj = (block.get_submodule(names[module]) for module in (parts.mlp, parts.down_proj))
    return replace(parts, block=block, mlp=mlp, down_proj=down_proj)


def _half(module: nn.Module) -> HalfLinear:
    weight = module.weight.T if isinstance(module, Conv1D) else module.weight
    assert isinstance(weight, Tensor)
    return HalfLinear(weight, module.bias if isinstance(module.bias, Tensor) else None)
