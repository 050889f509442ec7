"""Keys and current values at the subject's last token, for a whole batch of requests.

The forward pass up to the first edited layer is made once per batch and goes straight on to the first reading of
keys; after each layer's write only the edited layers behind it run again, and one run serves keys and current
values. What the rows have in common at their beginning, the contexts, is run once and not once per edit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nmke.editors.rows import prompt_rows
from nmke.models.key_pass import SharedPass, WholePass
from nmke.models.load import EditableModel
from nmke.models.replay import in_rows, replay_is_exact
from nmke.models.tracing import record_inputs, record_outputs, replace_output
from nmke.types import EditRequest, Keys


class KeyPass:
    """The prompts of a batch up to their anchors, ready to be run through the edited layers.

    Args:
        model: The model; weights of the edited layers may change between calls, earlier ones may not.
        requests: The batch.
        contexts: Prefixes of every prompt, the first one empty.
        layers: The edited layers, ascending.

    Attributes:
        owner: The edit of each row.
        weights: Of each edit's rows in `average`, [edits, rows].
        gaps: By layer, how far the reference row's key lies from the mean key of the latest `collect`.
    """

    def __init__(
        self,
        model: EditableModel,
        requests: Sequence[EditRequest],
        contexts: Sequence[str],
        layers: Sequence[int],
    ) -> None:
        self.model, self.layers = model, tuple(layers)
        found = [prompt_rows(model, request, contexts) for request in requests]
        ids = [row.ids[: row.anchor + 1] for rows in found for row in rows]
        weights = _average_weights([[row.bare for row in rows] for rows in found])
        self.weights = weights.to(model.device)
        starts = torch.tensor([0, *(len(rows) for rows in found)]).cumsum(0)[:-1]
        self._reference = starts.to(model.device)  # the bare row, or the first context where that is left out
        self.owner = torch.repeat_interleave(
            torch.arange(len(found)), torch.tensor([len(rows) for rows in found])
        ).to(model.device)
        self.gaps: dict[int, Keys] = {}
        self._pass: SharedPass | WholePass = (
            SharedPass(model, ids, self.layers)
            if replay_is_exact(model)
            else WholePass(model, ids, self.layers)
        )
        self._rows, self._columns = torch.arange(len(ids), device=model.device), self._pass.columns

    @torch.no_grad()
    def collect(
        self, deltas: Mapping[int, Float[Tensor, "edits d_model"]] | None = None, changed: int | None = None
    ) -> tuple[dict[int, Keys], Float[Tensor, "edits d_model"]]:
        """Keys of the edited layers and the last edited layer's current output.

        Args:
            deltas: Added to each layer's down-projection output at the anchor, per edit.
            changed: The only layer written since the last call; what comes before it is not run again.

        Returns:
            Keys per layer [edits, d_mlp], the mean of the bare row and of the mean of the others, in float64
            (of the layers from `changed` on); and the output of the last edited layer at the reference row,
            [edits, d_model].
        """
        layers = self.model.layout.layers
        start = self.layers[0] if changed is None else changed
        modules = {i: layers[i].down_proj for i in self.layers if i >= start}
        last = layers[self.layers[-1]].block
        with record_outputs({"last": last}, clone=True) as outputs:
            seen = self.at_anchors(modules, deltas, changed)
        device = self._rows.device
        keys = {i: self.average(each) for i, each in seen.items()}
        self.gaps |= {i: each[self._reference] - keys[i] for i, each in seen.items()}
        return keys, outputs["last"].to(device)[self._rows, self._columns][self._reference].double()

    @torch.no_grad()
    def at_anchors(
        self,
        modules: Mapping[Any, nn.Module],
        deltas: Mapping[int, Float[Tensor, "edits d_model"]] | None = None,
        changed: int | None = None,
    ) -> dict[Any, Float[Tensor, "rows width"]]:
        """What modules of the edited layers read at the anchor, row by row (see `owner`), in float64.

        Args:
            modules: Which modules, under keys of the caller's.
            deltas: As in `collect`.
            changed: As in `collect`.
        """
        layers = self.model.layout.layers
        start = self.layers[0] if changed is None else changed
        self._pass.prepare(start)
        with ExitStack() as stack:
            inputs = stack.enter_context(record_inputs(modules))
            for i, delta in (deltas or {}).items():
                stack.enter_context(replace_output(layers[i].down_proj, self._adder(delta)))
            self._pass.run(start)
        count = len(self._rows)
        device = self._rows.device  # a spread model's layers are elsewhere
        return {
            key: in_rows(inputs[key].to(device), count)[self._rows, self._columns].double() for key in modules
        }

    def average(self, seen: Float[Tensor, "rows width"]) -> Float[Tensor, "edits width"]:
        """The mean over each edit's rows: of the bare row and of the mean of the others."""
        return self.weights @ seen

    def _adder(self, delta: Tensor):  # type: ignore[no-untyped-def]  # a closure over the rows
        def change(out: Tensor) -> Tensor:
            out = out.clone()
            in_rows(out, len(self._rows))[self._rows, self._columns] += delta.to(out)[self.owner]
            return out

        return change


def _average_weights(bare: Sequence[Sequence[bool]]) -> Float[Tensor, "edits rows"]:
    """Weights that average each edit's rows: half for the bare row, half shared by the others."""
    weights = torch.zeros(len(bare), sum(len(flags) for flags in bare), dtype=torch.float64)
    start = 0
    for edit, flags in enumerate(bare):
        others = len(flags) - sum(flags)
        for offset, flag in enumerate(flags):
            alone = others == 0 or not any(flags)
            share = 1.0 if alone else 0.5
            weights[edit, start + offset] = share / (sum(flags) if flag else others)
        start += len(flags)
    return weights
