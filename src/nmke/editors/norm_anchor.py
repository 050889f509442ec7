"""NAS: every target value gets the norm that target values had on the unedited model.

Source: "Toward Ultra-Long-Horizon Sequential Model Editing", arXiv:2602.02543: with v0 the MLP's output and
v* = v0 + delta, v* is rescaled to c, the mean ‖v*‖ of a pilot on the unedited model; an edit whose ‖v*‖ exceeds 2c is
skipped.
Differs: the pilot is the first 16 of the facts that come with this package, optimised once per session on the
unedited weights. A skipped edit keeps its key in the batch, with nothing to write.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from nmke.config import EditConfig
from nmke.editors.blue import BLUE
from nmke.editors.rows import prompt_rows
from nmke.editors.stabilisers import Stabiliser, stabilisers
from nmke.editors.targets import Targets, optimise_targets
from nmke.facts import bundled_facts
from nmke.models.load import EditableModel
from nmke.models.replay import Site, in_rows
from nmke.models.tokens import pad_batch
from nmke.models.tracing import record_outputs, stop_after
from nmke.progress import Progress
from nmke.types import EditRequest

NORM_ANCHOR = "norm-anchor"
PILOT = 16
LARGEST = 2.0  # in units of the anchor

Values = Mapping[int, Float[Tensor, "edits d_model"]]

stabilisers.register(
    NORM_ANCHOR,
    Stabiliser(),
    source="arXiv:2602.02543",
    summary="rescale target values to their mean norm on the unedited model",
    doc=__doc__,
)


def pilot_norms(
    model: EditableModel, contexts: Sequence[str], site: Site, config: EditConfig, progress: Progress
) -> dict[int, float]:
    """Mean ‖v*‖ per layer that has target values, over the pilot's facts, on the model as it is (unedited).

    Args:
        model: The unedited model.
        contexts: Prefixes of every prompt, the first one empty.
        site: Where target values live.
        config: Resolved settings.
        progress: Told about the optimisation.
    """
    assert config.layers is not None
    facts = bundled_facts()[:PILOT]
    groups = [(config.layers[0],), (config.layers[-1],)] if BLUE in config.stabilisers else [config.layers]
    norms: dict[int, float] = {}
    for group in groups:
        where = group if site == "down_proj" else group[-1:]
        targets = optimise_targets(model, facts, contexts, where, site, config, progress)
        outputs = mlp_outputs(model, facts, contexts, targets)
        norms |= {i: float((outputs[i] + targets.deltas[i]).norm(dim=1).mean()) for i in targets.layers}
    return norms


def anchored(targets: Targets, outputs: Values, anchors: Mapping[int, float]) -> Targets:
    """Target values whose v* = v0 + delta have the anchor's norm; those far beyond it change nothing.

    Args:
        targets: As optimised.
        outputs: The MLP's output v0 of each edit, per layer.
        anchors: The norm per layer.
    """
    deltas, values = dict(targets.deltas), dict(targets.values)
    for layer in targets.layers:
        old = outputs[layer].to(deltas[layer])
        wanted = old + deltas[layer]
        norms = wanted.norm(dim=1, keepdim=True)
        scaled = wanted * (anchors[layer] / norms.clamp(min=1e-30))
        delta = torch.where(norms > LARGEST * anchors[layer], 0.0, scaled - old)
        values[layer] = values[layer] - deltas[layer] + delta
        deltas[layer] = delta
    return replace(targets, deltas=deltas, values=values)


def mlp_outputs(
    model: EditableModel, requests: Sequence[EditRequest], contexts: Sequence[str], targets: Targets
) -> dict[int, Float[Tensor, "edits d_model"]]:
    """What each target layer's down-projection writes at the anchor of every edit's reference row."""
    if targets.site == "down_proj":
        return {i: targets.values[i] - targets.deltas[i] for i in targets.layers}
    rows = [prompt_rows(model, request, contexts)[0] for request in requests]
    batch = pad_batch([list(r.ids[: r.anchor + 1]) for r in rows], model.encoder.pad_id, device=model.device)
    parts = {i: model.layout.layers[i] for i in targets.layers}
    last = parts[max(parts)].block
    with (
        torch.no_grad(),
        record_outputs({i: p.down_proj for i, p in parts.items()}) as seen,
        stop_after(last),
    ):
        model.model(**model.inputs(batch))
    columns = torch.tensor([r.anchor for r in rows], device=model.device)
    each = torch.arange(len(rows), device=model.device)
    return {i: in_rows(out, len(rows))[each, columns] for i, out in seen.items()}
