"""LoRA: a low-rank adapter on the down-projections, trained on the facts and merged.

Source: Hu et al. 2021, arXiv:2106.09685: ΔW = (α/r) B A with A random and B zero at first; as a baseline for editing,
trained on −log p(answer | prompt).
Differs: made and trained with PEFT, but on down-projections only (EasyEdit's baseline adapts the attention), and
merged after every batch, so that a run holds plain weights; each batch begins with a fresh adapter. r = 8, α = 16.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from nmke.editors.method import PEFT, Batch, Method, methods
from nmke.editors.pipeline import BatchResult, Stopwatch
from nmke.editors.training import answer_rows, edit_losses, fit
from nmke.errors import ConfigError
from nmke.models.load import EditableModel
from nmke.types import LayerUpdate

RANK, ALPHA, ADAPTER = 8, 16, "edit"


def adapt(batch: Batch) -> BatchResult:
    """Train an adapter on the batch's facts; see `Compute`."""
    clock, model, config = Stopwatch(), batch.model, batch.config
    names = [request.id for request in batch.requests]
    with clock.stage("training"), adapters(model, batch.layers, config.seed) as layers:
        trained = [p for layer in layers.values() for p in _factors(layer)]
        for parameter in trained:
            parameter.requires_grad_()
        optimizer = torch.optim.Adam(trained, lr=config.lr)
        ended = fit(answer_rows(model, batch.requests), partial(edit_losses, model), optimizer, config, names)
        updates = tuple(_update(index, layer) for index, layer in layers.items())
    owners = tuple(range(len(batch.requests)))
    return BatchResult(updates, {}, ended.as_targets(), {}, owners, {}, clock.seconds)


@contextmanager
def adapters(model: EditableModel, layers: tuple[int, ...], seed: int) -> Iterator[dict[int, Any]]:
    """Fresh adapters in front of the down-projections; the modules are put back behind the `with`.

    Raises:
        ConfigError: If PEFT is not installed.
    """
    try:
        from peft import LoraConfig
        from peft.tuners.lora import LoraModel
    except ImportError as error:
        raise ConfigError("method 'lora' needs PEFT; install it with: pip install \"nmke[lora]\"") from error
    parts = {i: model.layout.layers[i] for i in layers}
    settings = LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        lora_dropout=0.0,
        target_modules=[part.down_proj_name for part in parts.values()],
        fan_in_fan_out=isinstance(next(iter(parts.values())).down_proj, Conv1D),
    )
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT warns of tied weights it does not touch
            adapted = LoraModel(model.model, settings, ADAPTER)
    try:
        yield {i: model.model.get_submodule(part.down_proj_name) for i, part in parts.items()}
    finally:
        adapted.unload()
        vars(model.model).pop("peft_config", None)
        model.model.requires_grad_(False)


def _factors(layer: Any) -> tuple[nn.Parameter, nn.Parameter]:
    return layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight


def _update(index: int, layer: Any) -> LayerUpdate:
    inner, outer = _factors(layer)
    left = (outer * layer.scaling[ADAPTER]).detach().float().clone()  # [d_model rank]
    return LayerUpdate(index, left, inner.detach().float().clone())


methods.register(
    "lora",
    Method(compute=adapt, defaults={"lr": 5e-3, "steps": 70, "stop_loss": 1e-2}, remembers=False),
    source="arXiv:2106.09685",
    summary="a low-rank adapter on the down-projections, trained with PEFT and merged",
    needs=(PEFT,),
    doc=__doc__,
)
