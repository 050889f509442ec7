"""What a batch leaves in the record: one entry per request, and the settings and numbers behind them."""

from __future__ import annotations

import math
import platform
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

import nmke
from nmke.active_edits import ActiveEdits, Place
from nmke.attribution import neuron_scores
from nmke.config import EditConfig, MaskName, replace_config
from nmke.editors import methods
from nmke.editors.method import Method, with_defaults
from nmke.editors.pipeline import BatchResult, default_layers
from nmke.editors.stabilisers import check_stabilisers, in_force, stabilisers
from nmke.editors.targets import FOUND
from nmke.errors import ConfigError, RequestError
from nmke.evaluation.target_scores import TargetScore
from nmke.events import EditRecord, Event
from nmke.health import HealthReport
from nmke.masking.per_edit import check_mask
from nmke.models.load import EditableModel
from nmke.types import EditRequest

LOOK_AHEAD = 10  # batches; how far `cut` looks for facts that go with those it has
KNOWN = {"reason": "the model already says this"}


@dataclass(frozen=True)
class BatchReport:
    """What one batch did.

    Args:
        event: Its row in the ledger, with one record per request.
        seconds: Time of each stage.
        masks: Per layer, the numbers behind the neurons chosen; empty without a mask.
        health: What the model was like after it; None when it was not looked at.
    """

    event: Event
    seconds: dict[str, float] = field(default_factory=dict)
    masks: dict[int, dict[str, float]] = field(default_factory=dict)
    health: HealthReport | None = None

    @property
    def records(self) -> tuple[EditRecord, ...]:
        """One record per request, in order."""
        return self.event.edits


def resolve(config: EditConfig, model: EditableModel) -> EditConfig:
    """The settings with the method's own defaults and layers filled in.

    Raises:
        ConfigError: If layers, batch size, neuron score or solver settings do not go with the method or the model.
    """
    filled = with_defaults(config, model.layout)
    method = methods.get(filled.method)
    brought = {k: v for name in in_force(method, filled) for k, v in stabilisers.get(name).defaults.items()}
    filled = replace_config(filled, **{k: v for k, v in brought.items() if k not in config.model_fields_set})
    _check_scope(filled, method)
    layers = filled.layers or (method.layers or default_layers)(model.layout.n_layers)
    if method.max_layers is not None and filled.layers is None:
        layers = layers[-method.max_layers :]
    limit = model.layout.n_layers
    if list(layers) != sorted(set(layers)) or layers[0] < 0 or layers[-1] >= limit - 1:
        raise ConfigError(
            f"layers {list(layers)} asked; this model can edit 0 to {limit - 2}, ascending and each once"
        )
    if method.max_layers is not None and len(layers) > method.max_layers:
        raise ConfigError(
            f"method {filled.method!r} edits {method.max_layers} layer, {len(layers)} asked; give one"
        )
    if not method.takes_mask(filled.mask):
        taken = [name for name in get_args(MaskName) if method.takes_mask(name)]
        raise ConfigError(
            f"mask {filled.mask!r} does not go with method {filled.method!r}, which takes {', '.join(taken)}; "
            "drop the mask or choose another method"
        )
    check_stabilisers(method, filled, layers)
    check_batch_size(filled.method, filled.batch_size)
    return replace_config(filled, layers=tuple(layers))


def _check_scope(config: EditConfig, method: Method) -> None:
    """Raise unless mask, scope, score and ratio go together and with the method."""
    takes_ratio: tuple[str, ...] = ("random",)
    if config.mask_scope == "edit":
        if not method.edit_masks:
            raise ConfigError(
                f"mask_scope 'edit' asked of method {config.method!r}, which masks a batch as a whole; "
                "choose method 'nmke-linear' or mask_scope 'batch'"
            )
        check_mask(config)
        takes_ratio = ("random", "fixed")
    else:
        neuron_scores.get(config.attribution)
    if config.ratio is not None and config.mask not in takes_ratio:
        raise ConfigError(
            f"ratio {config.ratio} goes with mask {' or '.join(map(repr, takes_ratio))}, {config.mask!r} asked; the "
            "other masks' ratios come from entropy: drop `ratio` or choose another mask"
        )


def check_batch_size(method: str, size: int) -> None:
    """Raise unless the method takes batches of `size`.

    Raises:
        ConfigError: If it takes smaller ones only.
    """
    largest = methods.get(method).max_batch
    if largest is not None and size > largest:
        raise ConfigError(f"method {method!r} takes batches of {largest}, {size} asked; lower batch_size")


def check_recalled(method: str, recalled: Sequence[str]) -> None:
    """Raise unless the method can go on with a run whose model looks things up in these side memories.

    Raises:
        ConfigError: If another method's memory is being recalled: its keys would not fit changed weights.
    """
    others = [kind for kind in recalled if kind != method]
    if others:
        raise ConfigError(
            f"method {method!r} asked for a run that holds a side memory of {others[0]!r}; go on with "
            f"{others[0]!r}, or begin another run"
        )


def cut(requests: Sequence[EditRequest], config: EditConfig) -> Iterator[list[EditRequest]]:
    """Batches of at most `config.batch_size`, in order but for what has to wait for the next one.

    No fact stands twice in a batch, the second edit of it supersedes the first; nor does a subject, where later edits
    have to hold earlier ones.
    """
    left, size = deque(requests), config.batch_size
    while left:
        batch: list[EditRequest] = []
        waiting: list[EditRequest] = []
        taken: set[str] = set()
        while left and len(batch) < size and len(waiting) < LOOK_AHEAD * size:
            request = left.popleft()
            key = request.subject_key if config.hold_earlier else request.fact_key
            (waiting if key in taken else batch).append(request)
            taken.add(key)
        left.extendleft(reversed(waiting))
        yield batch


def not_in_run(requests: Sequence[EditRequest], index: ActiveEdits, *, resume: bool) -> list[EditRequest]:
    """The requests that the run does not hold yet.

    Args:
        requests: What was asked.
        index: What the run holds.
        resume: Skip what it holds instead of refusing.

    Raises:
        RequestError: If two requests share an id, or one is in the run already and `resume` is False.
    """
    seen: set[str] = set()
    for request in requests:
        if request.id in seen:
            raise RequestError(
                f"edit id {request.id!r} occurs twice in the facts; give every fact its own id"
            )
        seen.add(request.id)
    double = [request.id for request in requests if request.id in index]
    if double and not resume:
        raise RequestError(
            f"{len(double)} of {len(requests)} facts are in the run already (first: {double[0]!r}); "
            "skip them with --resume"
        )
    return [request for request in requests if request.id not in index]


def check_batch(requests: Sequence[EditRequest], config: EditConfig) -> None:
    """Raise unless the requests can be edited together.

    Raises:
        RequestError: If there is none, or two of them ask for the same fact.
        ConfigError: If the method takes fewer.
    """
    if not requests:
        raise RequestError("a batch without facts was asked for; give at least one")
    seen: dict[str, str] = {}
    for request in requests:
        other = seen.setdefault(request.fact_key, request.id)
        if other != request.id or len([r for r in requests if r.id == request.id]) > 1:
            raise RequestError(
                f"edits {other!r} and {request.id!r} of one batch ask for the same fact ({request.text!r}); "
                "keep one, or edit them one after the other"
            )
    check_batch_size(config.method, len(requests))


def known_records(requests: Sequence[EditRequest]) -> list[EditRecord]:
    """Records of a batch of which nothing had to be written."""
    return [EditRecord(request, "known", KNOWN) for request in requests]


def records(
    requests: Sequence[EditRequest],
    before: Sequence[TargetScore],
    after: Mapping[str, TargetScore],
    result: BatchResult,
    superseded: Mapping[str, Place],
) -> list[EditRecord]:
    """One record per request, in order.

    Args:
        requests: The batch.
        before: The model's answers before it.
        after: Its answers afterwards, by id; requests that are missing were known.
        result: What was written.
        superseded: Earlier edits of the same facts, by id.
    """
    found = []
    place = {name: i for i, name in enumerate(after)}
    for request, first in zip(requests, before, strict=True):
        if request.id not in after:
            found.append(EditRecord(request, "known", KNOWN))
            continue
        index, now = place[request.id], after[request.id]
        detail: dict[str, Any] = {
            "loss": result.targets.losses[index],
            "target_probability": result.targets.probabilities[index],
            "steps": result.targets.steps[index],
            "probability_before": math.exp(first.log_prob),
            "probability_after": math.exp(now.log_prob),
        }
        if request.id in superseded:
            detail["supersedes"] = superseded[request.id].id
        if now.accuracy < 1.0:
            detail["reason"] = _why_not(result.targets.probabilities[index])
        found.append(EditRecord(request, "written" if now.accuracy == 1.0 else "failed", detail))
    return found


def body(
    config: EditConfig,
    result: BatchResult | None = None,
    *,
    drift: Mapping[int, float] | None = None,
    superseded: Mapping[str, Place] | None = None,
    health: HealthReport | None = None,
) -> dict[str, Any]:
    """What the ledger says about a batch beyond its requests."""
    content: dict[str, Any] = {"config": config.model_dump(mode="json"), "versions": versions()}
    if result is not None:
        content |= {
            "seconds": result.seconds,
            "masks": {str(layer): mask.detail for layer, mask in result.masks.items()},
            "scores": {str(layer): numbers for layer, numbers in result.score_summaries.items()},
            "drift": {str(layer): value for layer, value in (drift or {}).items()},
            "superseded": {name: place.id for name, place in (superseded or {}).items()},
        }
    if health is not None:
        content["health"] = health.as_json()
    return content


def versions() -> dict[str, str]:
    """Versions of what computes."""
    import torch
    import transformers

    return {
        "nmke": nmke.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def _why_not(target_probability: float) -> str:
    if target_probability < FOUND:
        return f"no target value was found (p = {target_probability:.2f}): try more rounds, more steps or another layer"
    return "the target was found but the write does not reach it: try once more, in a smaller batch or in more layers"
