"""NMKE: a neuron of its own for every fact; a little-used neuron is rewritten, input and output, to hold it.

Source: Liu et al. 2025, arXiv:2510.22139, for editing few, chosen neurons per fact; those that ordinary text can
spare are chosen here.
Differs: The input of an MLP at a subject's last token tells the subject from other text almost without error, so a
fact gets a whole neuron (gate row, up row, down column) instead of a linear change of columns that every text uses.
The paper's masks of columns are `nmke-linear` and `nmke-published` (`nmke.editors.nmke_linear`).

With x̄ the fact's mean input over its contexts and A the second moment of MLP inputs on ordinary text and before other
names (`nmke.stats.subjects`), mixed with the subjects of the batch and of earlier edits, u = A⁻¹x̄ scaled to u·x̄ = 1
would be the linear reading of the subject that answers least to all else; the one taken is held to about 1 in each
context, too. And c = (A + ridge)⁻¹μ, μ the mean input, is close to 1 at names, a bias where the model has none; it is
moved to 1 in the fact's contexts, too. With s = u·x the gate reads α(s - θ) and the up-projection
((2 - θ) - s)/(1 - θ): below θ the neuron is silent, at s = 1 its coefficient is flat, so that paraphrases get the
same write. An MLP without a gate has the ramp α(s - θ) alone. The column written is delta over the neuron's largest
coefficient on the fact's own rows, delta the target of `nmke.editors.targets` for that layer alone.

Layers are filled one after another, the lowest first: what is written in one shifts what later layers read, and
their neurons were not made to tell that from their subjects. Half of a layer's neurons may be taken, by what they do
on ordinary text and at its first token, max(E[k_i²], E[k_i²] at position 0)·‖w_i‖², least first; those of earlier
edits are told by their reading, which differs from the unedited model's, so that undoing an edit frees them. Mask
"random" takes as many at random, as a control.

Where a norm stands behind the MLP, delta may be several times as long as the MLP's own output (`NORMED_CLAMP`): the
norm makes what is written as long as ever, and a write that outweighs the rest is the same at .8 of its coefficient.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from nmke.editors.free_neurons import Chosen, choose_own, homes_of, own_layers
from nmke.editors.keys import KeyPass
from nmke.editors.method import INPUT_STATISTICS, STATISTICS, Batch, Method, methods
from nmke.editors.pipeline import BatchResult, ProvisionalWrites, Stopwatch, target_site
from nmke.editors.rows import with_second_anchors
from nmke.editors.targets import Targets
from nmke.errors import NumericsError
from nmke.models.blocks import LayerParts
from nmke.models.load import EditableModel
from nmke.models.read_in import coefficients
from nmke.models.replay import Site
from nmke.models.weights import ReadingMatrix
from nmke.types import Columns, EditRequest, Gram, Keys, LayerUpdate, NeuronMask, Part

NORMED_CLAMP = 5.0  # largest ‖delta‖ in units of the MLP's own output, where a norm stands behind it
Inputs = Float[Tensor, "edits d_model"]


@dataclass(frozen=True)
class OwnNeurons:
    """Computes a batch; see the module.

    Args:
        threshold: θ, the reading of the subject below which a neuron is silent; the subject itself reads 1.
        sharpness: α, steepness of the activation's input.
        ordinary_share: Weight of ordinary inputs in A and μ; the rest is the batch's own subjects.
        name_share: Share of ordinary subjects in the ordinary inputs; the rest is text.
        earlier_weight: Weight in A and μ of each subject of an earlier edit, as much as one has in a batch of 100.
        ridge: Added to A, in units of its mean diagonal.
        bias_ridge: The same, for c: its error at names in other words is what the paraphrases lose.
        slack: How far the reading may differ between the contexts of a fact: 0 not at all.
    """

    threshold: float = 0.55
    sharpness: float = 64.0
    ordinary_share: float = 0.7
    name_share: float = 0.5
    earlier_weight: float = 0.003
    ridge: float = 1e-3
    bias_ridge: float = 1.0
    slack: float = 0.02

    def __call__(self, batch: Batch) -> BatchResult:
        """See `Compute`.

        Raises:
            ConfigError: If no layer has neurons left.
            LayoutError: If the model does not show what its neurons read.
            NumericsError: If a neuron does not fire for its own subject.
        """
        clock, model = Stopwatch(), batch.model
        requests, owners = with_second_anchors(model, batch.requests)
        homes = homes_of(batch, owners)
        chosen = {layer: choose_own(batch, layer, homes.count(layer)) for layer in sorted(set(homes))}
        targets = _find_targets(batch, requests, homes)
        clock.count("targets", targets.seconds)
        with clock.stage("keys"):
            rows = KeyPass(model, requests, batch.contexts, batch.layers)
            seen = _Seen.at_anchors(model, rows, chosen)
        updates = []
        with batch.progress.task("layers", total=len(chosen)) as task, ProvisionalWrites(model) as writes:
            for layer, (index, mask) in chosen.items():
                mine = [row for row, home in enumerate(homes) if home == layer]
                with clock.stage("solve"):
                    reading = self._reading(batch, layer, index, seen.read[layer], rows, mine)
                    writes.add(reading)
                    largest = _largest(
                        model.layout.layers[layer], index, seen.entered[layer], rows.owner, mine
                    )
                    _check_fires(largest, [requests[row].id for row in mine], layer)
                    updates.append(_with_columns(reading, targets.deltas[layer][mine], largest, mask))
                    writes.add(updates[-1])
                task.advance(1, f"layer {layer}: {len(index)} neurons")
            with clock.stage("keys"):
                keys, inputs = _to_remember(model, rows, chosen)
        masks = {layer: mask for layer, (_, mask) in chosen.items()}
        return BatchResult(
            tuple(updates), keys, targets, masks, owners, {}, clock.seconds, memory_inputs=inputs
        )

    def detectors(
        self,
        rows: Inputs,
        weights: Float[Tensor, "edits rows"],
        moment: Gram,
        earlier: Gram | None = None,
    ) -> tuple[Inputs, Inputs]:
        """Directions u and c, one of each for every edit; float64.

        Args:
            rows: What the MLP is given at the subject in every context, [rows, d_model].
            weights: Of each edit's rows in its mean, zero for those of other edits; every line adds up to 1.
            moment: E[x₁ x₁ᵀ] of ordinary MLP inputs with a one below each, [d_model + 1, d_model + 1].
            earlier: Sum of x₁ x₁ᵀ over the subjects of earlier edits; None without any.
        """
        rows, weights, moment = rows.double(), weights.double(), moment.double()
        subjects = weights @ rows
        ordinary, own = self.ordinary_share, 1 - self.ordinary_share
        system = ordinary * moment[:-1, :-1] + own * subjects.T @ subjects / len(subjects)
        mean = ordinary * moment[:-1, -1] + own * subjects.mean(dim=0)
        unit = system.diagonal().mean() * torch.eye(len(system)).to(system)
        if earlier is not None:
            system = system + self.earlier_weight * earlier[:-1, :-1].to(system)
            mean = mean + self.earlier_weight * earlier[:-1, -1].to(mean)
        solved = torch.linalg.solve(system + self.ridge * unit, rows.T).T
        constant = torch.linalg.solve(system + self.bias_ridge * unit, mean)
        found = [self._even(rows[w > 0], solved[w > 0], w[w > 0], constant) for w in weights]
        return torch.stack([u for u, _ in found]), torch.stack([c for _, c in found])

    def _even(
        self,
        rows: Inputs,
        solved: Inputs,
        weights: Float[Tensor, " rows"],
        constant: Float[Tensor, " d_model"],
    ) -> tuple[Float[Tensor, " d_model"], Float[Tensor, " d_model"]]:
        """By combinations of A⁻¹x, u and c that read about 1 in each row; u exactly 1 in the mean."""
        overlaps = rows @ solved.T
        slack = self.slack * overlaps.diagonal().mean() / (weights * len(weights))
        wanted = torch.stack([torch.ones_like(weights), 1 - rows @ constant], dim=1)
        u, c = torch.linalg.solve(overlaps + torch.diag(slack), wanted).T @ solved
        return u / (weights * (rows @ u)).sum(), constant + c

    def _reading(
        self, batch: Batch, layer: int, index: Chosen, seen: Inputs, rows: KeyPass, mine: Sequence[int]
    ) -> LayerUpdate:
        """The new reading of the neurons of the rows `mine`; their writing stays."""
        ordinary = batch.inputs[layer]
        moment = (1 - self.name_share) * ordinary.text + self.name_share * ordinary.subjects
        memory = batch.state.inputs.get(layer)
        earlier = memory.moment() if memory is not None else None
        found, constants = (
            every[list(mine)] for every in self.detectors(seen, rows.weights, moment, earlier)
        )
        parts = batch.model.layout.layers[layer]
        gap = 1 - self.threshold
        ramp = (self.sharpness, -self.sharpness * self.threshold)
        lines: dict[Part, tuple[float, float]] = {"up": ramp}
        if parts.read_in.gate is not None:
            lines = {"gate": ramp, "up": (-1 / gap, (2 - self.threshold) / gap)}
        replaced = {
            part: Columns(index.to(torch.int32).cpu(), _line(parts, part, found, constants, *line))
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
    def at_anchors(cls, model: EditableModel, rows: KeyPass, layers: Iterable[int]) -> _Seen:
        """On the model as it is."""
        parts = {layer: model.layout.layers[layer] for layer in layers}
        entered = {("entered", layer): part.mlp for layer, part in parts.items()}
        read = {("read", layer): part.read_in.behind_activation for layer, part in parts.items()}
        found = rows.at_anchors({**entered, **read})
        return cls({i: found["entered", i] for i in parts}, {i: found["read", i] for i in parts})


def _to_remember(
    model: EditableModel, rows: KeyPass, written: Iterable[int]
) -> tuple[dict[int, Keys], dict[int, Keys]]:
    """Keys of the layers that were written, and what every layer's MLP is given, with a one behind it; float32.

    A layer that is filled later has to know the subjects of today as they look there after today's write.
    """
    layers = model.layout.layers
    found = rows.at_anchors(
        {("keys", i): layers[i].down_proj for i in written}
        | {("inputs", i): layers[i].read_in.behind_activation for i in rows.layers}
    )
    means = {key: rows.average(each).float() for key, each in found.items()}
    return (
        {i: means["keys", i] for i in written},
        {i: nn.functional.pad(means["inputs", i], (0, 1), value=1.0) for i in rows.layers},
    )


def _find_targets(batch: Batch, requests: Sequence[EditRequest], homes: Sequence[int]) -> Targets:
    """Targets of every request for its own layer alone; the rows of other layers are zero there."""
    model, config = batch.model, batch.config
    sites = {target_site(model, config, (layer,)) for layer in homes}
    site: Site = "block" if sites == {"block"} else "down_proj"
    shape = (len(requests), model.layout.d_model)
    losses, probabilities, steps = ([0.0] * len(requests), [0.0] * len(requests), [0] * len(requests))
    deltas: dict[int, Tensor] = {}
    values: dict[int, Tensor] = {}
    seconds = 0.0
    for layer in sorted(set(homes)):
        mine = [row for row, home in enumerate(homes) if home == layer]
        asked = [requests[row] for row in mine]
        found = batch.find_targets(
            model, asked, batch.contexts, (layer,), site, config, batch.progress, held=batch.held
        )
        seconds += found.seconds
        for every, own in ((deltas, found.deltas[layer]), (values, found.values[layer])):
            every[layer] = own.new_zeros(shape)
            every[layer][mine] = own
        for place, row in enumerate(mine):
            losses[row], probabilities[row] = found.losses[place], found.probabilities[place]
            steps[row] = found.steps[place]
    return Targets(
        site, tuple(deltas), deltas, values, tuple(losses), tuple(probabilities), tuple(steps), seconds
    )


def _line(
    parts: LayerParts, part: Part, found: Inputs, constants: Inputs, slope: float, offset: float
) -> Float[Tensor, "rows edits"]:
    """Columns that read slope · u·x + offset, in the weights' type."""
    matrix = parts.matrix(part)
    columns = slope * found.T
    if isinstance(matrix, ReadingMatrix) and matrix.has_bias:
        columns = torch.cat([columns, columns.new_full((1, columns.shape[1]), offset)])
    else:
        columns = columns + offset * constants.T
    return columns.to(matrix.read())


@torch.no_grad()
def _largest(
    parts: LayerParts,
    index: Chosen,
    entered: Float[Tensor, "rows d_model"],
    owner: Int[Tensor, " rows"],
    mine: Sequence[int],
) -> Float[Tensor, " edits"]:
    """The largest coefficient of each of the neurons `index` over the rows of its own edit, `mine` in order."""
    weight = parts.matrix("down").read()
    found = coefficients(parts.mlp, parts.down_proj, entered[None].to(weight))[0][:, index.to(weight.device)]
    rows = [owner == edit for edit in mine]
    return torch.stack([found[row, place].max() for place, row in enumerate(rows)]).double()


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
    "nmke",
    Method(
        compute=OwnNeurons(),
        defaults={"mask": "least", "rounds": 2, "hold_earlier": True},
        normed_defaults={"clamp": NORMED_CLAMP},
        masks=("least", "random"),
        layers=own_layers,
        remembers=False,
        linear="nmke-linear",
    ),
    source="arXiv:2510.22139",
    summary="every fact gets a whole neuron of its own, which fires for its subject only",
    needs=(STATISTICS, INPUT_STATISTICS),
    doc=__doc__,
)
