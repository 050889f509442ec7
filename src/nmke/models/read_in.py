"""What the neurons of a layer read through: which linear layers feed them, and which of two is the gate.

Shown on the MLP by itself, with random inputs: the output of a linear layer is changed for half of the neurons, and
only their coefficients may change with it. A matrix whose output multiplies the coefficient (factor -2 gives factor
-2) is the up-projection; one behind the activation gives something else.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nmke.errors import LayoutError
from nmke.models.probing import TOKENS, close
from nmke.models.tracing import record_inputs, replace_output
from nmke.models.weights import LINEAR_TYPES, written_matrix

FACTOR = -2.0  # negative, so that a ReLU shows as well


@dataclass(frozen=True)
class ReadIn:
    """The linear layers that feed the neurons of one layer.

    Args:
        up: The one that multiplies the activation's output; the only one where there is no gate.
        up_name: Its path in the model.
        gate: The one behind the activation, None where `up` itself is.
        gate_name: Its path in the model, "" without.
    """

    up: nn.Module
    up_name: str
    gate: nn.Module | None = None
    gate_name: str = ""

    @property
    def behind_activation(self) -> nn.Module:
        """The layer whose output the activation is taken of."""
        return self.up if self.gate is None else self.gate


def find_read_in(mlp: nn.Module, down_proj: nn.Module, down_proj_name: str) -> ReadIn:
    """Find what feeds the neurons of one layer; the MLP is run, nothing is written.

    Args:
        mlp: The module around the down-projection.
        down_proj: What the neurons write through.
        down_proj_name: Its path in the model.

    Raises:
        LayoutError: If the MLP holds one fused matrix for gate and up, or works otherwise.
    """
    inside = {path: module for path, module in mlp.named_modules() if isinstance(module, LINEAR_TYPES)}
    own = next(path for path, module in inside.items() if module is down_proj)
    holder = down_proj_name.removesuffix(own).removesuffix(".")
    if not own:
        raise _refused(down_proj_name, "its layer holds the MLP's parts without a module around them")
    d_model, d_mlp = written_matrix(down_proj).shape
    feeding = [p for p, m in inside.items() if p != own and written_matrix(m).shape == (d_mlp, d_model)]
    if not 1 <= len(feeding) <= 2:
        shapes = {p: list(written_matrix(m).shape) for p, m in inside.items() if p != own}
        raise _refused(
            holder, f"one or two linear layers of shape [{d_mlp}, {d_model}] were needed; found {shapes}"
        )
    with torch.no_grad():
        multiplies = {path: _multiplies(mlp, inside[path], down_proj, holder) for path in feeding}
    ups = [path for path, found in multiplies.items() if found]
    if len(ups) != len(feeding) - 1:
        raise _refused(
            holder, f"{len(ups)} of {len(feeding)} linear layers multiply the coefficient: {ups or 'none'}"
        )
    gate = next(path for path, found in multiplies.items() if not found)
    if not ups:
        return ReadIn(inside[gate], f"{holder}.{gate}")
    return ReadIn(inside[ups[0]], f"{holder}.{ups[0]}", inside[gate], f"{holder}.{gate}")


def coefficients(
    mlp: nn.Module, down_proj: nn.Module, hidden: Float[Tensor, "batch seq d_model"]
) -> Float[Tensor, "batch seq d_mlp"]:
    """What the neurons of an MLP are for its own input, as the weights are now."""
    with record_inputs({"neurons": down_proj}) as seen:
        mlp(hidden)
    return seen["neurons"].clone()


def _multiplies(mlp: nn.Module, linear: nn.Module, down_proj: nn.Module, holder: str) -> bool:
    """Whether the linear layer's output is a factor of the coefficients, neuron by neuron.

    Raises:
        LayoutError: If a neuron's coefficient does not depend on its own value alone.
    """
    plain = _changed_coefficients(mlp, down_proj, linear, holder)
    half = torch.arange(plain.shape[-1], device=plain.device) % 2 == 0
    changed = _changed_coefficients(mlp, down_proj, linear, holder, half)
    if not torch.equal(plain[..., ~half], changed[..., ~half]) or torch.equal(plain, changed):
        raise _refused(holder, "a neuron's coefficient does not depend on its own row alone")
    return close(changed[..., half], FACTOR * plain[..., half])


def _changed_coefficients(
    mlp: nn.Module, down_proj: nn.Module, linear: nn.Module, holder: str, half: Tensor | None = None
) -> Tensor:
    """Input of the down-projection for random inputs, the values of some neurons times `FACTOR` in `linear`."""
    weight = written_matrix(linear)
    generator = torch.Generator().manual_seed(0)
    given = torch.randn(1, TOKENS, weight.shape[1], generator=generator).to(weight)

    def change(out: Tensor) -> Tensor:
        return out if half is None else torch.where(half, FACTOR * out, out)

    try:
        with replace_output(linear, change):
            return coefficients(mlp, down_proj, given)
    except (TypeError, RuntimeError, ValueError) as error:
        raise _refused(holder, f"it does not run on hidden states alone ({error})") from error


def _refused(holder: str, found: str) -> LayoutError:
    return LayoutError(
        f"what the neurons of {holder!r} read was asked for: {found}; use a method that writes down-projections only"
    )
