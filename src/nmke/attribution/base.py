"""The contract of a neuron score, and what every score reads from the model.

A score gives one number per prompt and neuron of a layer. It sees a `Readout`: everything that one forward
pass over the prompts left behind at the tokens that are scored.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nmke.attribution.logits import raw_logits, wide
from nmke.attribution.rerun import Rerun
from nmke.errors import LayoutError
from nmke.models.layout import ModelLayout
from nmke.models.load import EditableModel
from nmke.models.replay import AnchoredRows, BlockReplay, in_rows
from nmke.models.tokens import TokenBatch
from nmke.models.tracing import record_inputs, record_outputs, replace_output
from nmke.registry import Registry
from nmke.types import Scores


@dataclass(frozen=True)
class Write:
    """What one unit of a down-projection's output adds to the residual stream, norms on the way frozen.

    Args:
        weight: Factor per channel, [d_model]; ones where the output is added unchanged.
        factors: Factor per prompt, [prompts].
    """

    weight: Float[Tensor, " d_model"]
    factors: Float[Tensor, " prompts"]


@dataclass(frozen=True)
class Readout:
    """What a forward pass left at the scored token of each prompt.

    Args:
        layout: The model's parts.
        coefficients: Per layer, the down-projection's input c, [prompts, d_mlp].
        middles: Per layer, the residual stream after attention and before the MLP's contribution,
            [prompts, d_model].
        writes: Per layer, how the down-projection's output enters the residual stream.
        finals: Hidden state before the final norm, [prompts, d_model].
        targets: The token whose log-probability is attributed, [prompts].
        rerun: The same prompts, to be run again with something changed at the scored token. Its answers are
            the targets given, or what the model predicts at each prompt's last token.
    """

    layout: ModelLayout
    coefficients: dict[int, Float[Tensor, "prompts d_mlp"]]
    middles: dict[int, Float[Tensor, "prompts d_model"]]
    writes: dict[int, Write]
    finals: Float[Tensor, "prompts d_model"]
    targets: Int[Tensor, " prompts"]
    rerun: Rerun

    @cached_property
    def gradients(self) -> dict[int, Float[Tensor, "prompts d_model"]]:
        """Gradient of the answer's log-probability by each layer's down-projection output, one pass for all."""
        return self.rerun.gradients(list(self.coefficients))


@runtime_checkable
class NeuronScore(Protocol):
    """Scores the neurons of one layer."""

    def __call__(self, readout: Readout, layer: int, amplification: float) -> Scores:
        """Float32 [prompts, d_mlp]."""
        ...


neuron_scores: Registry[NeuronScore] = Registry("attribution score")


@torch.no_grad()
def read_out(
    model: EditableModel,
    batch: TokenBatch,
    layers: Sequence[int],
    columns: Int[Tensor, " prompts"] | None = None,
    targets: Int[Tensor, " prompts"] | None = None,
) -> Readout:
    """One forward pass over the prompts, read at each prompt's last real token.

    Args:
        model: The model as it is now.
        batch: The prompts, padded on either side.
        layers: Layers to read.
        columns: Read at these columns instead.
        targets: Attribute these tokens instead of the predicted ones.
    """
    layout = model.layout
    downs = {i: layout.layers[i].down_proj for i in layers}
    rows = torch.arange(len(batch.input_ids), device=batch.input_ids.device)
    at = batch.last_index if columns is None else columns
    blocks = {i: layout.layers[i].block for i in layers}
    with (
        record_inputs({**downs, **{f"block {i}": block for i, block in blocks.items()}}) as inputs,
        record_inputs({"norm": layout.final_norm}) as last,
        record_outputs(downs, clone=True) as written,
        record_outputs(blocks, clone=True) as after,
    ):
        replay = BlockReplay.record(model, model.inputs(batch), min(layers), through_norm=True)
    finals = wide(last["norm"][rows, at])
    middles: dict[int, Tensor] = {}
    writes: dict[int, Write] = {}
    for i in layers:
        out = wide(in_rows(written[i], len(rows))[rows, at])
        if layout.layers[i].direct_write:
            middles[i] = wide(after[i][rows, at]) - out
            writes[i] = Write(torch.ones_like(out[0]), torch.ones_like(out[:, 0]))
        else:
            run = partial(_block_with, replay, i, inputs[f"block {i}"], rows, at)
            middles[i], writes[i] = _indirect_write(run, out)
    coefficients = {i: wide(in_rows(inputs[i], len(rows))[rows, at]) for i in layers}
    ends = finals if columns is None else wide(last["norm"][rows, batch.last_index])
    answers = _predicted(model, ends) if targets is None else targets
    targets = (answers if columns is None else _predicted(model, finals)) if targets is None else targets
    rerun = Rerun(model, AnchoredRows.of(batch, at), answers)
    return Readout(layout, coefficients, middles, writes, finals, targets, rerun)


def _predicted(model: EditableModel, hidden: Float[Tensor, "rows d_model"]) -> Int[Tensor, " rows"]:
    """The likeliest token behind each hidden state; the logit map keeps the order."""
    return raw_logits(model.layout, model.layout.final_norm(hidden.to(model.dtype))).argmax(dim=1)


def _block_with(
    replay: BlockReplay, layer: int, hidden: Tensor, rows: Tensor, at: Tensor, written: Tensor
) -> Tensor:
    """Output of one block at the scored tokens when its down-projection gives `written` there."""

    def change(out: Tensor) -> Tensor:
        out = out.clone()
        in_rows(out, len(rows))[rows, at] = written.to(out)
        return out

    with replace_output(replay.layout.layers[layer].down_proj, change):
        return wide(replay.run_block(layer, hidden)[rows, at])


def _indirect_write(run: Callable[[Tensor], Tensor], out: Tensor) -> tuple[Tensor, Write]:
    """Middle of the block and the frozen factors between down-projection and residual stream.

    A norm or factor behind the down-projection is diagonal once its statistic is frozen; an input of equal
    mean square and alternating signs shows the diagonal, the same for all prompts up to one number each. What
    it makes of the real output verifies it.

    Raises:
        LayoutError: If it is not.
    """
    middle = run(torch.zeros_like(out))
    size = out.pow(2).mean(dim=1, keepdim=True).sqrt()
    signs = torch.ones_like(out[0])
    signs[1::2] = -1
    diagonal = (run(size * signs) - middle) / (size * signs)
    weight = diagonal[0] / diagonal[0].pow(2).mean().sqrt().clamp(min=1e-30)
    factors = (diagonal @ weight) / weight.pow(2).sum()
    written = run(out) - middle
    if (out * factors[:, None] * weight - written).norm() > 0.05 * written.norm():
        raise LayoutError(
            "what stands between the down-projection and the residual stream is neither a factor nor an RMS norm; "
            "attribution needs one of them: edit with `--mask none`"
        )
    return middle, Write(weight, factors)
