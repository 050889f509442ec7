"""The one loop that every locate-then-edit method runs through: locate, keys, targets, solve, write.

Compute, then commit: `compute_updates` leaves the model exactly as it found it (the writes it needs between
layers are taken back bit by bit); the session alone commits what it returns.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor

from nmke.attribution import neuron_scores
from nmke.config import EditConfig
from nmke.editors.blue import BLUE, in_both_layers
from nmke.editors.keys import KeyPass
from nmke.editors.memory import KeyMemory, SolverState
from nmke.editors.method import Batch, Directions, Method
from nmke.editors.norm_anchor import anchored, mlp_outputs
from nmke.editors.per_edit import per_edit_directions
from nmke.editors.rows import with_second_anchors
from nmke.editors.scored_prompts import ScoredPrompts, scored_prompts
from nmke.editors.side import SideMemory
from nmke.editors.stabilisers import filtered, in_force, weighed
from nmke.editors.targets import Targets, optimise_targets
from nmke.errors import NumericsError
from nmke.masking.select import select_neurons
from nmke.models.load import EditableModel
from nmke.models.ranks import shared_out
from nmke.models.replay import Site
from nmke.models.updates import matrix_at, put_back, write_update
from nmke.models.weights import DownProjection, swapped_in
from nmke.progress import Task
from nmke.stats.covariance import LayerStats
from nmke.types import Columns, EditRequest, Keys, LayerUpdate, MatrixPlace, NeuronMask


@dataclass(frozen=True)
class BatchResult:
    """What one batch would write, and what led to it.

    Args:
        updates: One update per edited layer, in the order of writing.
        memory_keys: Keys after the write, per layer, for the memory of earlier edits.
        targets: Target values and how the optimisation ended.
        masks: Selected neurons per layer; empty without a mask.
        owners: For each row of keys and targets, the request it belongs to: the requests in order, then second
            anchors of those whose subject is the model's first token.
        score_summaries: Mean, highest and share of positive scores per layer, for the record.
        seconds: Time of each stage.
        side: The side memory that takes the place of the method's, None when it keeps none.
        memory_inputs: What MLPs are given at the subjects after the write, with a one behind it, per layer
            [rows, d_model + 1], for methods that remember that.
    """

    updates: tuple[LayerUpdate, ...]
    memory_keys: dict[int, Keys]
    targets: Targets
    masks: dict[int, NeuronMask]
    owners: tuple[int, ...]
    score_summaries: dict[int, dict[str, float]]
    seconds: dict[str, float] = field(default_factory=dict)
    side: SideMemory | None = None
    memory_inputs: dict[int, Keys] = field(default_factory=dict)


def default_layers(n_layers: int) -> tuple[int, ...]:
    """Five layers at the relative depth that the papers use for Llama (4-8 of 32), fewer in small models."""
    if n_layers <= 5:
        return (max(0, n_layers // 2 - 1),)
    first = max(1, round(0.13 * n_layers))
    return tuple(range(first, min(first + 5, n_layers - 1)))


def target_site(model: EditableModel, config: EditConfig, layers: Sequence[int]) -> Site:
    """Where target values live: see `EditConfig.targets`; a norm behind the MLP forces joint targets."""
    if config.targets == "joint":
        return "down_proj"
    direct = all(model.layout.layers[i].direct_write for i in layers)
    return "block" if config.targets == "spread" or direct else "down_proj"


def compute_updates(method: Method, batch: Batch) -> BatchResult:
    """What `method` would write for a batch; the model is left as it was.

    Raises:
        NumericsError: If a system is not finite or ill-conditioned; names the edits and the layer.
        RequestError: If a prompt does not fit the model.
    """
    if method.compute is not None:
        return method.compute(batch)
    config = batch.config
    if BLUE in config.stabilisers and len(batch.layers) > 1:
        rest = replace(batch, find_targets=optimise_targets)  # the second layer's are sought after a write
        return in_both_layers(
            config,
            ProvisionalWrites(batch.model),
            lambda one: _locate_then_edit(replace(rest, config=one), method),
        )
    return _locate_then_edit(batch, method)


def _locate_then_edit(batch: Batch, method: Method) -> BatchResult:
    """The loop itself, for a method with a solver; see `compute_updates`."""
    model, contexts, config, layers = batch.model, batch.contexts, batch.config, batch.layers
    clock = Stopwatch()
    requests, owners = with_second_anchors(model, batch.requests)
    targets = _find_targets(batch, method, requests)
    clock.count("targets", targets.seconds)
    with clock.stage("targets"):
        if batch.anchors:
            targets = anchored(targets, mlp_outputs(model, requests, contexts, targets), batch.anchors)
    with clock.stage("attribution"):
        masks, summaries = choose_neurons(model, requests, contexts, config, batch.turn)
    with clock.stage("keys"):
        rows = KeyPass(model, requests, contexts, layers)
    write = _write_jointly if target_site(model, config, layers) == "down_proj" else _write_in_turn
    ids = tuple(request.id for request in requests)
    with batch.progress.task("layers", total=len(layers)) as task, ProvisionalWrites(model) as writes:
        solve = _Solve(model, method, batch.stats, batch.state, masks, config, ids, batch.turn, clock, task)
        updates, memory_keys = write(solve, rows, targets, writes)
    masks = {update.layer: update.mask for update in updates if update.mask is not None}
    return BatchResult(tuple(updates), memory_keys, targets, masks, owners, summaries, clock.seconds)


def _find_targets(batch: Batch, method: Method, requests: Sequence[EditRequest]) -> Targets:
    """Target values, found on the weights that the method asks for."""
    model, config = batch.model, batch.config
    site = target_site(model, config, batch.layers)
    where = batch.layers if site == "down_proj" else batch.layers[-1:]
    with _unedited(model) if method.targets_on == "unedited" else nullcontext():
        return batch.find_targets(
            model, requests, batch.contexts, where, site, config, batch.progress, held=batch.held
        )


def choose_neurons(
    model: EditableModel,
    requests: Sequence[EditRequest],
    contexts: Sequence[str],
    config: EditConfig,
    turn: int = 0,
) -> tuple[dict[int, NeuronMask], dict[int, dict[str, float]]]:
    """The neurons of each edited layer that this batch may write into, and a summary of their scores.

    Args:
        model: The model as it is now.
        requests: The batch; every context times every prompt is attributed.
        contexts: Prefixes, the first one empty.
        config: Mask and attribution settings.
        turn: Number of the batch, so that random masks differ between batches.

    Returns:
        Masks and score summaries per layer; both empty for mask "none".
    """
    assert config.layers is not None
    if config.mask == "none" or config.mask_scope == "edit":  # a mask per edit is chosen where it is solved
        return {}, {}
    prompts = scored_prompts(model, requests, contexts, config.attribution_token, config.attribution_target)
    found = list(shared_out(model, _choose_in_layers, config.layers, prompts, config, turn))
    masks = {layer: mask for layer, (mask, _) in zip(config.layers, found, strict=True)}
    return masks, {layer: summary for layer, (_, summary) in zip(config.layers, found, strict=True)}


def _choose_in_layers(
    model: EditableModel, layers: Sequence[int], prompts: ScoredPrompts, config: EditConfig, turn: int
) -> Iterator[tuple[NeuronMask, dict[str, float]]]:
    """Mask and summary of one layer after another, read in the forward passes that serve all layers."""
    assert config.layers is not None
    score = neuron_scores.get(config.attribution)
    readout = prompts.read(model, config.layers)
    for layer in layers:
        scores = score(readout, layer, config.amplification)
        positive = float((scores > 0).float().mean())
        summary = {"mean": float(scores.mean()), "max": float(scores.max()), "positive": positive}
        yield select_neurons(scores, config, seed=mask_seed(config, turn, layer)), summary


def _write_in_turn(
    solve: _Solve, rows: KeyPass, targets: Targets, writes: ProvisionalWrites
) -> tuple[list[LayerUpdate], dict[int, Keys]]:
    """Layer after layer, each taking an equal share of what is still missing at the last one.

    The keys that a layer is solved for are also its keys after the edit: no later write comes before it.
    """
    updates: list[LayerUpdate] = []
    memory: dict[int, Keys] = {}
    for position, layer in enumerate(rows.layers):
        with solve.clock.stage("keys"):
            keys, current = rows.collect(changed=rows.layers[position - 1] if position else None)
        missing = targets.values[rows.layers[-1]].double() - current
        left = len(rows.layers) - position
        share = left if solve.method.share == "equal" else math.sqrt(left)
        updates.append(solve(layer, keys[layer], missing / share + solve.old_value_gap(layer, rows)))
        memory[layer] = keys[layer].float()
        writes.add(updates[-1])
    return updates, memory


def _write_jointly(
    solve: _Solve, rows: KeyPass, targets: Targets, writes: ProvisionalWrites
) -> tuple[list[LayerUpdate], dict[int, Keys]]:
    """Every layer on its own, with the keys it sees when all deltas are in place."""
    with solve.clock.stage("keys"):
        keys, _ = rows.collect(targets.deltas)
    updates = [
        solve(layer, keys[layer], targets.deltas[layer].double() + solve.old_value_gap(layer, rows))
        for layer in rows.layers
    ]
    for update in updates:
        writes.add(update)
    with solve.clock.stage("keys"):
        return updates, {i: k.float() for i, k in rows.collect()[0].items()}


@contextmanager
def _unedited(model: EditableModel) -> Iterator[None]:
    """The model as loaded inside the `with`."""
    with swapped_in((matrix_at(model.layout, place), base) for place, base in model.unedited.items()):
        yield


class ProvisionalWrites:
    """Writes that are taken back, bit for bit, when the context ends."""

    def __init__(self, model: EditableModel) -> None:
        self._model = model
        self._before: list[dict[MatrixPlace, Columns]] = []

    def __enter__(self) -> ProvisionalWrites:
        return self

    def add(self, update: LayerUpdate) -> None:
        """Write one update."""
        self._before.append(write_update(self._model.layout, update))

    def __exit__(self, *_: object) -> None:
        for before in reversed(self._before):
            put_back(self._model.layout, before)


@dataclass(frozen=True)
class _Solve:
    model: EditableModel
    method: Method
    stats: Mapping[int, LayerStats]
    state: SolverState
    masks: Mapping[int, NeuronMask]
    config: EditConfig
    ids: tuple[str, ...]
    turn: int
    clock: Stopwatch
    task: Task

    def __call__(self, layer: int, keys: Keys, residuals: Float[Tensor, "edits d_model"]) -> LayerUpdate:
        names = in_force(self.method, self.config)
        memory = weighed(self.state.memory(layer, keys.shape[1], keys.device), names)
        with self.clock.stage("solve"):
            try:
                right, mask = self._directions(layer, keys, memory)
            except NumericsError as error:
                raise NumericsError(f"edits {_named(self.ids)}, layer {layer}: {error}") from error
        if not bool(torch.isfinite(right).all() and torch.isfinite(residuals).all()):
            raise NumericsError(
                f"edits {_named(self.ids)}, layer {layer}: the update is not finite; lower `lr` or raise `l2`"
            )
        update = LayerUpdate(layer, residuals.T.float().contiguous(), right.float().contiguous(), mask)
        now = self._weights(layer)
        with self.clock.stage("solve"):
            update = filtered(update, now, self.model.unedited.get(MatrixPlace(layer), now), names)
        self.task.advance(1, f"layer {layer}: {int(update.columns.sum())} of {right.shape[1]} neurons")
        return update

    def old_value_gap(self, layer: int, rows: KeyPass) -> Tensor | float:
        """What the old value at the bare prompt is above that at the mean key, [edits, d_model]."""
        if self.method.value_at == "bare":
            return 0.0
        return rows.gaps[layer] @ self._weights(layer).double().T

    def _weights(self, layer: int) -> Float[Tensor, "d_model d_mlp"]:
        return DownProjection(self.model.layout.layers[layer].down_proj).read()

    def _directions(self, layer: int, keys: Keys, memory: KeyMemory) -> tuple[Directions, NeuronMask | None]:
        if self.config.mask_scope == "edit":
            seed = mask_seed(self.config, self.turn, layer)
            return per_edit_directions(keys, self.stats[layer], memory, self.config, seed)
        mask = self.masks.get(layer)
        keep = None if mask is None else mask.keep
        assert self.method.solver is not None
        return self.method.solver.directions(keys, self.stats[layer], memory, keep, self.config), mask


def mask_seed(config: EditConfig, turn: int, layer: int) -> int:
    """Seed of a layer's random mask, another one for each batch."""
    return config.seed + 7919 * turn + layer


@dataclass
class Stopwatch:
    """Adds up the time of named stages."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count what happens inside towards `name`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.count(name, time.perf_counter() - start)

    def count(self, name: str, seconds: float) -> None:
        """Count so many seconds towards `name`: those of targets are counted as when they were sought."""
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds


def _named(ids: Sequence[str]) -> str:
    return ids[0] if len(ids) == 1 else f"{ids[0]}..{ids[-1]} ({len(ids)})"
