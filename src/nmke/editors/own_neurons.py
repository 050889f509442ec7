"""Neurons of its own for every fact: a few of the least used neurons of each layer are rewritten to hold it.

**Ours.** The input of an MLP at a subject's last token tells the subject from other text almost without error, so a
fact gets whole neurons (gate row, up row, down column) instead of a linear change of columns that every text uses.
With x̄ the fact's mean input over its contexts and A the second moment of MLP inputs on ordinary text, mixed with the
batch's own subjects, u = A⁻¹x̄ scaled to u·x̄ = 1 is the linear reading of the subject that answers least to all else,
and c = A⁻¹μ, μ the mean input, is close to 1 on every token: a bias where the model has none. With s = u·x the gate
reads α(s - θ) and the up-projection ((2 - θ) - s)/(1 - θ): below θ the neuron is silent, at s = 1 its coefficient is
flat, so that paraphrases get the same write. An MLP without a gate has the ramp α(s - θ) alone. The column written is
delta over the neuron's largest coefficient on the fact's own rows; deltas are joint targets (`nmke.editors.targets`).

Neurons are taken by what they do on ordinary text, E[k_i²]·‖w_i‖², least first; those of earlier edits are told by
their reading, which differs from the unedited model's, so that undoing an edit frees them. Mask "random" takes as many
at random, as a control.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nmke.editors.keys import KeyPass
from nmke.editors.method import INPUT_STATISTICS, STATISTICS, Batch, Method, methods
from nmke.editors.pipeline import BatchResult, ProvisionalWrites, Stopwatch, mask_seed
from nmke.editors.rows import with_second_anchors
from nmke.editors.targets import optimise_targets
from nmke.errors import ConfigError, NumericsError
from nmke.models.blocks import LayerParts
from nmke.models.load import EditableModel
from nmke.models.read_in import coefficients
from nmke.models.weights import ReadingMatrix
from nmke.types import Columns, Gram, LayerUpdate, MatrixPlace, NeuronMask, Part

Inputs = Float[Tensor, "edits d_model"]
Chosen = Int[Tensor, " edits"]


@dataclass(frozen=True)
class OwnNeurons:
    """Computes a batch; see the module.

    Args:
        threshold: θ, the reading of the subject below which a neuron is silent; the subject itself reads 1.
        sharpness: α, steepness of the activation's input.
        text_share: Weight of ordinary text in A and μ; the rest is the batch's own subjects.
        ridge: Added to A, in units of its mean diagonal.
    """

    threshold: float = 0.5
    sharpness: float = 16.0
    text_share: float = 0.7
    ridge: float = 1e-3

    def __call__(self, batch: Batch) -> BatchResult:
        """See `Compute`.

        Raises:
            ConfigError: If a layer has no neurons left.
            LayoutError: If the model does not show what its neurons read.
            NumericsError: If a neuron does not fire for its own subject.
        """
        clock, model = Stopwatch(), batch.model
        requests, owners = with_second_anchors(model, batch.requests)
        layers = layers_of(batch)
        chosen = {layer: choose_own(batch, layer, len(requests)) for layer in layers}
        with clock.stage("targets"):
            targets = optimise_targets(
                model, requests, batch.contexts, layers, "down_proj", batch.config, batch.progress
            )
        with clock.stage("keys"):
            rows = KeyPass(model, requests, batch.contexts, layers)
            seen = _Seen.at_anchors(model, rows, targets.deltas)
        ids = [request.id for request in requests]
        updates = []
        with batch.progress.task("layers", total=len(layers)) as task, ProvisionalWrites(model) as writes:
            for layer, (index, mask) in chosen.items():
                with clock.stage("solve"):
                    reading = self._reading(batch, layer, index, rows.average(seen.read[layer]))
                    writes.add(reading)
                    largest = _largest(model.layout.layers[layer], index, seen.entered[layer], rows.owner)
                    _check_fires(largest, ids, layer)
                    updates.append(_with_columns(reading, targets.deltas[layer], largest, mask))
                    writes.add(updates[-1])
                task.advance(1, f"layer {layer}: {len(index)} neurons")
            with clock.stage("keys"):
                memory = {layer: keys.float() for layer, keys in rows.collect()[0].items()}
        masks = {layer: mask for layer, (_, mask) in chosen.items()}
        return BatchResult(tuple(updates), memory, targets, masks, owners, {}, clock.seconds)

    def detectors(self, subjects: Inputs, moment: Gram) -> tuple[Inputs, Float[Tensor, " d_model"]]:
        """Directions u, one for each subject, and c; float64.

        Args:
            subjects: x̄ of each edit.
            moment: E[x₁ x₁ᵀ] of ordinary MLP inputs with a one below each, [d_model + 1, d_model + 1].
        """
        subjects, moment = subjects.double(), moment.double()
        text, own = self.text_share, 1 - self.text_share
        system = text * moment[:-1, :-1] + own * subjects.T @ subjects / len(subjects)
        system.diagonal().add_(self.ridge * system.diagonal().mean())
        mean = text * moment[:-1, -1] + own * subjects.mean(dim=0)
        solved = torch.linalg.solve(system, torch.cat([subjects, mean[None]]).T).T
        found, constant = solved[:-1], solved[-1]
        return found / (found * subjects).sum(dim=1, keepdim=True), constant

    def _reading(self, batch: Batch, layer: int, index: Chosen, subjects: Inputs) -> LayerUpdate:
        """The neurons' new reading; their writing stays."""
        found, constant = self.detectors(subjects, batch.inputs[layer])
        parts = batch.model.layout.layers[layer]
        gap = 1 - self.threshold
        ramp = (self.sharpness, -self.sharpness * self.threshold)
        lines: dict[Part, tuple[float, float]] = {"up": ramp}
        if parts.read_in.gate is not None:
            lines = {"gate": ramp, "up": (-1 / gap, (2 - self.threshold) / gap)}
        replaced = {
            part: Columns(index.to(torch.int32).cpu(), _line(parts, part, found, constant, *line))
            for part, line in lines.items()
        }
        empty = found.new_zeros(0, parts.d_mlp, dtype=torch.float32)
        return LayerUpdate(
            layer, found.new_zeros(found.shape[1], 0, dtype=torch.float32), empty, None, replaced
        )


@dataclass(frozen=True)
class _Seen:
    """What every edited layer's MLP is given at the anchors, and what its neurons read, row by row."""

    entered: dict[int, Float[Tensor, "rows d_model"]]
    read: dict[int, Float[Tensor, "rows d_model"]]

    @classmethod
    def at_anchors(cls, model: EditableModel, rows: KeyPass, deltas: dict[int, Tensor]) -> _Seen:
        """With all deltas in place."""
        parts = {layer: model.layout.layers[layer] for layer in rows.layers}
        entered = {("entered", layer): part.mlp for layer, part in parts.items()}
        read = {("read", layer): part.read_in.behind_activation for layer, part in parts.items()}
        found = rows.at_anchors({**entered, **read}, deltas)
        return cls({i: found["entered", i] for i in parts}, {i: found["read", i] for i in parts})


def layers_of(batch: Batch) -> tuple[int, ...]:
    """The layers that take this batch: all that are edited."""
    return batch.layers


def choose_own(batch: Batch, layer: int, count: int) -> tuple[Chosen, NeuronMask]:
    """The neurons of a layer that a batch takes.

    Args:
        batch: What is edited, with mask "least" or "random".
        layer: Where.
        count: How many are needed, one for each row of the batch.

    Returns:
        Their indices, one per row, and the mask for the record.

    Raises:
        ConfigError: If fewer are left.
    """
    free = free_neurons(batch.model, layer)
    available = int(free.sum())
    if available < count:
        raise ConfigError(
            f"{count} neurons of layer {layer} were asked for; {available} of {len(free)} are not held by earlier "
            "edits: edit more layers, undo superseded edits, or begin another run"
        )
    if batch.config.mask == "random":
        generator = torch.Generator().manual_seed(mask_seed(batch.config, batch.turn, layer))
        order = torch.rand(len(free), generator=generator).to(free.device)
    else:
        order = importance(batch, layer)
    index = order.double().masked_fill(~free, float("inf")).argsort(stable=True)[:count]
    keep = torch.zeros_like(free)
    keep[index] = True
    counts = {"kept": float(count), "d_mlp": float(len(free)), "free": float(available)}
    return index, NeuronMask(keep, counts)


def free_neurons(model: EditableModel, layer: int) -> Tensor:
    """True where a neuron reads what it reads in the unedited model, [d_mlp]."""
    parts = model.layout.layers[layer]
    place = MatrixPlace(layer, "up" if parts.read_in.gate is None else "gate")
    now = parts.matrix(place.part).read()
    return (now == model.unedited.get(place, now)).all(dim=0)


def importance(batch: Batch, layer: int) -> Float[Tensor, " d_mlp"]:
    """E[k_i²]·‖w_i‖² on ordinary text: how much each neuron of the unedited model writes."""
    model = batch.model
    now = model.layout.layers[layer].matrix("down").read()
    column = model.unedited.get(MatrixPlace(layer), now).double()
    return batch.stats[layer].mean_squares.double().to(column.device) * column.square().sum(dim=0)


def _line(
    parts: LayerParts, part: Part, found: Inputs, constant: Tensor, slope: float, offset: float
) -> Float[Tensor, "rows edits"]:
    """Columns that read slope · u·x + offset, in the weights' type."""
    matrix = parts.matrix(part)
    columns = slope * found.T
    if isinstance(matrix, ReadingMatrix) and matrix.has_bias:
        columns = torch.cat([columns, columns.new_full((1, columns.shape[1]), offset)])
    else:
        columns = columns + offset * constant[:, None]
    return columns.to(matrix.read())


@torch.no_grad()
def _largest(
    parts: LayerParts, index: Chosen, entered: Float[Tensor, "rows d_model"], owner: Int[Tensor, " rows"]
) -> Float[Tensor, " edits"]:
    """Each new neuron's largest coefficient over the rows of its own edit."""
    weight = parts.matrix("down").read()
    found = coefficients(parts.mlp, parts.down_proj, entered[None].to(weight))[0]
    own = found[:, index.to(found.device)].double().gather(1, owner.to(found.device)[:, None])[:, 0]
    start = own.new_full((len(index),), float("-inf"))
    return start.scatter_reduce(0, owner.to(own.device), own, "amax")


def _check_fires(largest: Float[Tensor, " edits"], ids: Sequence[str], layer: int) -> None:
    for name, coefficient in zip(ids, largest.tolist(), strict=True):
        if not coefficient > 0:
            raise NumericsError(
                f"edit {name!r}, layer {layer}: its neuron does not fire for its subject (coefficient "
                f"{coefficient:.2g}); load the model in float32, or edit fewer facts at once"
            )


def _with_columns(
    reading: LayerUpdate, deltas: Float[Tensor, "edits d_model"], largest: Tensor, mask: NeuronMask
) -> LayerUpdate:
    """The whole neurons: their reading, and columns that write the deltas at the largest coefficient."""
    like = next(iter(reading.replaced.values()))
    columns = (deltas.double().to(largest.device) / largest[:, None]).T.to(like.values)
    replaced = {**reading.replaced, "down": Columns(like.index, columns.contiguous())}
    return LayerUpdate(reading.layer, reading.left, reading.right, mask, replaced)


methods.register(
    "nmke-own",
    Method(
        compute=OwnNeurons(),
        defaults={"mask": "least", "targets": "joint", "lr": 0.2, "stop_loss": 0.15},
        masks=("least", "random"),
        remembers=False,
    ),
    source="arXiv:2510.22139",
    summary="every fact gets whole neurons of its own, which fire for its subject only",
    needs=(STATISTICS, INPUT_STATISTICS),
    doc=__doc__,
)
