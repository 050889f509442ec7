"""Inside one decoder layer: which linear layer is the MLP's down-projection, shown from one recorded pass."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from nmke.errors import LayoutError
from nmke.models.probing import TOKENS, Call, at_row, close, gradient, is_position_wise, rows
from nmke.models.read_in import ReadIn, find_read_in
from nmke.models.weights import (
    LINEAR_TYPES,
    DownProjection,
    NeuronMatrix,
    ReadingMatrix,
    written_matrix,
)
from nmke.types import Part

EXPERTS_NEED = (
    "editing one would need a down-projection, key statistics and a memory of past keys for every expert, and the "
    "router's choice at the subject's token kept fixed while the target is optimised"
)


@dataclass(frozen=True)
class LayerParts:
    """The parts of one decoder layer.

    Args:
        index: Position among the decoder layers, from 0.
        block: The decoder layer; its first output is the residual stream behind it.
        mlp: The outermost position-wise module around `down_proj` inside the block, or `down_proj` itself
            where the block holds it directly.
        down_proj: The linear layer (`nn.Linear` or `Conv1D`) that writes the MLP's result.
        down_proj_name: Its path in the model, such as "model.layers.3.mlp.down_proj".
        block_name: The block's path.
        d_mlp: How many neurons it reads.
        direct_write: True where the residual stream takes its output unchanged, that is where the block's
            output minus the down-projection's is the stream without the MLP.
    """

    index: int
    block: nn.Module
    mlp: nn.Module
    down_proj: nn.Module
    down_proj_name: str
    block_name: str
    d_mlp: int
    direct_write: bool

    @cached_property
    def read_in(self) -> ReadIn:
        """What feeds the neurons; probed when first asked for.

        Raises:
            LayoutError: If that cannot be shown, as for a fused gate and up-projection.
        """
        return find_read_in(self.mlp, self.down_proj, self.down_proj_name)

    @property
    def shows_readings(self) -> bool:
        """Whether `read_in` can be had."""
        try:
            return self.read_in is not None
        except LayoutError:
            return False

    def linear(self, part: Part) -> tuple[nn.Module, str]:
        """One of the MLP's linear layers, and its path in the model.

        Raises:
            LayoutError: If the layer has no such part.
        """
        if part == "down":
            return self.down_proj, self.down_proj_name
        if part == "up":
            return self.read_in.up, self.read_in.up_name
        if self.read_in.gate is None:
            raise LayoutError(
                f"the gate of layer {self.block_name!r} was asked for; its MLP has none: write 'up' and 'down' alone"
            )
        return self.read_in.gate, self.read_in.gate_name

    def matrix(self, part: Part) -> NeuronMatrix:
        """One of the MLP's matrices, one column per neuron.

        Raises:
            LayoutError: If the layer has no such part.
        """
        module, _ = self.linear(part)
        return DownProjection(module) if part == "down" else ReadingMatrix(module)


def find_parts(index: int, name: str, block: nn.Module, calls: dict[str, Call], d_model: int) -> LayerParts:
    """Find a layer's MLP and the linear layer through which it writes.

    Args:
        index: The layer's position.
        name: The layer's path in the model.
        block: The layer.
        calls: What the layer and every module in it saw, recorded with gradients.
        d_model: Width of the residual stream.

    Raises:
        LayoutError: If there is no such linear layer, or more than one.
    """
    children = dict(_position_wise(name, block, calls))
    linears = {
        f"{child}.{path}" if path else child: module
        for child, top in children.items()
        for path, module in top.named_modules()
        if isinstance(module, LINEAR_TYPES)
    }
    _refuse_experts(name, children, linears, calls)
    path = _pick_writer(name, linears, calls, d_model)
    holder = next(child for child in children if f"{path}.".startswith(f"{child}."))
    _verify(path, linears, calls, d_model)
    _refuse_altered(path, holder, calls)
    weights = at_row(calls[name].output, TOKENS - 1)
    reached = gradient(calls[name].output, calls[path].output, weights)
    return LayerParts(
        index=index,
        block=block,
        mlp=children[holder],
        down_proj=linears[path],
        down_proj_name=path,
        block_name=name,
        d_mlp=written_matrix(linears[path]).shape[1],
        direct_write=reached is not None and torch.equal(reached, weights),
    )


def _position_wise(name: str, module: nn.Module, calls: dict[str, Call]) -> Iterator[tuple[str, nn.Module]]:
    """The block's children that do not mix positions; containers that never run are looked into."""
    for child_name, child in module.named_children():
        path = f"{name}.{child_name}"
        if path not in calls:
            yield from _position_wise(path, child, calls)
        elif is_position_wise(calls[path].output, calls[path].inputs):
            yield path, child


def _refuse_experts(
    name: str, children: dict[str, nn.Module], linears: dict[str, nn.Module], calls: dict[str, Call]
) -> None:
    """Refuse weight matrices outside any linear layer, and linear layers that this text did not use."""
    loose = [
        (f"{child}.{path}", parameter)
        for child, top in children.items()
        for path, parameter in top.named_parameters()
        if parameter.ndim > 1 and min(parameter.shape) > 1 and not _is_plain(top, path)
    ]
    if loose:
        path, parameter = max(loose, key=lambda item: item[1].numel())
        raise LayoutError(
            f"layer {name!r} keeps {path!r} of shape {list(parameter.shape)} outside any linear layer, as a mixture of "
            f"experts (MoE) does; {EXPERTS_NEED}; use a dense model"
        )
    idle = [path for path in linears if calls.get(path, Call()).count != 1]
    if idle:
        raise LayoutError(
            f"layer {name!r} has {len(idle)} of {len(linears)} position-wise linear layers that did not run "
            f"exactly once, such as {idle[0]!r}, as in a mixture of experts (MoE) or beside an adapter; merge "
            f"adapters; {EXPERTS_NEED}"
        )


def _is_plain(top: nn.Module, path: str) -> bool:
    """True if the parameter is inside a linear layer or an embedding."""
    owners = path.split(".")[:-1]
    holders = (top.get_submodule(".".join(owners[:depth])) for depth in range(len(owners) + 1))
    return any(isinstance(holder, (*LINEAR_TYPES, nn.Embedding)) for holder in holders)


def _pick_writer(name: str, linears: dict[str, nn.Module], calls: dict[str, Call], d_model: int) -> str:
    """The linear layer that writes d_model from most neurons, other than through a later one.

    Narrow side branches (gates inside norms, per-layer inputs) may write beside it; a second one of half its
    width or more may not.
    """
    width = {path: written_matrix(module).shape[1] for path, module in linears.items()}
    writers = [path for path, module in linears.items() if written_matrix(module).shape[0] == d_model]
    if not writers:
        raise LayoutError(
            f"layer {name!r} has no MLP down-projection: no position-wise linear layer writes {d_model} values; "
            f"candidates: {', '.join(linears) or 'none'}; every layer needs a dense, unquantised MLP, so "
            "attention-free and mixed stacks are not supported"
        )
    last = max(writers, key=lambda path: calls[path].order)
    writers = [path for path in writers if path == last or _writes_past(path, last, calls[name], calls)]
    widest = max(writers, key=lambda path: width[path])
    if any(2 * width[path] > width[widest] for path in writers if path != widest):
        raise LayoutError(
            f"layer {name!r} has {len(writers)} candidates for the down-projection: {', '.join(writers)}; "
            "several MLPs, mixtures of experts (MoE) and adapters are not supported"
        )
    return widest


def _writes_past(path: str, last: str, block: Call, calls: dict[str, Call]) -> bool:
    """True if the block's output depends on `path` other than through the input of `last`."""
    weights = at_row(block.output, TOKENS - 1)
    total = gradient(block.output, calls[path].output, weights)
    if total is None:
        return False
    into_last = gradient(block.output, calls[last].inputs[0], weights)
    if into_last is None:
        return True
    through = gradient(calls[last].inputs[0], calls[path].output, into_last)
    return through is None or not close(through, total)


def _verify(path: str, linears: dict[str, nn.Module], calls: dict[str, Call], d_model: int) -> None:
    """Refuse a down-projection that is not plain, or that no position-wise up-projection feeds."""
    module, call = linears[path], calls[path]
    if "weight" not in module._parameters:
        raise LayoutError(
            f"{path!r} computes its weight (a parametrisation); merge it into a plain parameter first"
        )
    if not call.inputs or not same_map(module, call.inputs[0], call.output):
        raise LayoutError(
            f"{path!r} is no plain linear layer: its output is not weight times input plus bias; "
            "load the model without adapters or quantisation"
        )
    if not any(_feeds(linears[other], calls[other], call, d_model) for other in linears if other != path):
        raise LayoutError(
            f"{path!r} is fed by no position-wise up-projection that reads {d_model} values; "
            f"candidates: {', '.join(other for other in linears if other != path) or 'none'}"
        )


def _feeds(module: nn.Module, up: Call, down: Call, d_model: int) -> bool:
    """True if the down-projection's neurons depend on this layer's input, at the same position only."""
    reads_stream = written_matrix(module).shape[1] == d_model and up.order < down.order
    return reads_stream and is_position_wise(down.inputs[0], up.inputs)


def _refuse_altered(path: str, holder: str, calls: dict[str, Call]) -> None:
    """Refuse an MLP whose output is not its down-projection's, alone or plus one of its own inputs."""
    written, given = calls[path].output, calls[holder].output
    rest = rows(given) - rows(written)
    if torch.equal(rows(given), rows(written)):
        return
    if not any(each.shape[-1] == rest.shape[-1] and close(rows(each), rest) for each in calls[holder].inputs):
        raise LayoutError(
            f"{holder!r} changes what {path!r} writes before giving it on; mixtures of experts (MoE), adapters "
            "and gates behind the down-projection are not supported"
        )


def same_map(module: nn.Module, given: Tensor, output: Tensor) -> bool:
    """True if the module's output is its weight times the input, plus its bias.

    Args:
        module: `nn.Linear` or `Conv1D`.
        given: Its input, one row per token.
        output: What it returned; of more than a thousand coordinates, an even share is compared.
    """
    if not isinstance(module, LINEAR_TYPES):
        return False
    step = 1 + output.shape[-1] // 1024
    work = torch.promote_types(output.dtype, torch.float32)
    with torch.no_grad():
        expected = rows(given).to(work) @ written_matrix(module)[::step].to(work).T
        if module.bias is not None:
            expected = expected + module.bias[::step].to(work)
    return close(rows(output)[:, ::step].to(work), expected, like=output.dtype)
