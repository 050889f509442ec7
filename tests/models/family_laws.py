"""What must hold for any model that can be edited, tried on one tiny random model of a family.

The tests try the families that people edit most; `benchmarks/compatibility.py` tries every family that the
installed transformers ships.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from tests import runs, tiny
from tests.models import families
from torch import Tensor

from nmke.models.blocks import LayerParts
from nmke.models.load import EditableModel
from nmke.models.tokens import pad_batch
from nmke.models.weights import DownProjection
from nmke.session import EditSession
from nmke.stats.store import StatsStore
from nmke.types import EditRequest

FACTS = (
    EditRequest("The train had left for {}", "France", "the", id="first"),
    EditRequest("The train had left for {}", "Marie Curie", "is", id="second"),
)
# Random weights answer at chance: a target may move far, a few neurons of 64 must do, and no limit of health counts.
SETTINGS = {
    **{name: value for name, value in runs.QUICK.items() if name != "layers"},
    "batch_size": 1,
    "steps": 12,
    "stop_loss": 0.0,
    "products": "float32",
}
LINEAR = {**SETTINGS, "mask": "fixed", "ratio": 0.25, "residual_ridge": 0.0, "l2": 0.01}
GAIN = 4.0


@dataclass(frozen=True)
class Findings:
    """What was seen on one family.

    Args:
        architecture: The model class.
        method: The method that edited it.
        n_layers: Decoder layers found.
        down_proj: Path of the first edited layer's down-projection.
        gained: Log-probability that the answers gained, the least of them, nats.
        changed: Largest share of columns that a single edit changed in a layer.
        others_changed: Names of tensors that changed and were none that the method may write.
        undone: Whether undoing gave back every byte.
        padding_gap: Largest difference of log-probabilities between a row alone and padded left or right.
    """

    architecture: str
    method: str
    n_layers: int
    down_proj: str
    gained: float
    changed: float
    others_changed: tuple[str, ...]
    undone: bool
    padding_gap: float


def tiny_editable(family: str) -> EditableModel:
    """The family's tiny model with a tokenizer that fits it, its weight matrices larger so that it has opinions.

    Raises:
        LayoutError: If it is refused.
    """
    tokenizer = tiny.tiny_tokenizer()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what a family's own code deprecates is not ours to mend
        model = families.tiny_family(family, vocab_size=len(tokenizer))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.mul_(GAIN)
        return EditableModel.wrap(model, tokenizer, name=family)


def try_family(family: str, folder: Path, **settings: object) -> Findings:
    """Edit two facts one after the other, look at what changed, undo both.

    Args:
        family: A `model_type` of transformers.
        folder: Empty folder for the run and its statistics.
        settings: `SETTINGS` for a neuron per fact, `LINEAR` for a mask per edit.

    Raises:
        LayoutError: If the family's structure is refused.
    """
    model = tiny_editable(family)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gap = padding_gap(model)
        config = runs.EditConfig.create(method="nmke", **settings)
        with EditSession.open(
            model, folder / "run", config=config, store=StatsStore(folder / "stats")
        ) as session:
            return _edited(session, family, gap)


def _edited(session: EditSession, family: str, gap: float) -> Findings:
    model = session.model
    as_loaded = runs.bits(model)
    gains, shares = [], []
    for fact in FACTS:
        before = {layer: _matrix(model, layer) for layer in session.config.layers or ()}
        record = session.edit_batch([fact]).records[0]
        gains.append(math.log(record.detail["probability_after"] / record.detail["probability_before"]))
        for layer, matrix in before.items():
            shares.append(float((_matrix(model, layer) != matrix).any(dim=0).float().mean()))
    layers = [model.layout.layers[layer] for layer in session.config.layers or ()]
    edited = {name for layer in layers for name in _written(layer, session.config.method)}
    after = runs.bits(model)
    others = tuple(
        name
        for name, content in after.items()
        if content != as_loaded[name] and not any(name.startswith(f"{each}.") for each in edited)
    )
    session.undo(len(FACTS))
    return Findings(
        architecture=type(model.model).__name__,
        method=session.config.method,
        n_layers=model.layout.n_layers,
        down_proj=min(layer.down_proj_name for layer in layers),
        gained=min(gains),
        changed=max(shares),
        others_changed=others,
        undone=runs.bits(model) == as_loaded,
        padding_gap=gap,
    )


def _written(layer: LayerParts, method: str) -> list[str]:
    """Paths of the linear layers that the method may write."""
    if method != "nmke":
        return [layer.down_proj_name]
    read = layer.read_in
    return [name for name in (layer.down_proj_name, read.up_name, read.gate_name) if name]


def _matrix(model: EditableModel, layer: int) -> Tensor:
    return DownProjection(model.layout.layers[layer].down_proj).read().clone()


@torch.no_grad()
def padding_gap(model: EditableModel) -> float:
    """Largest difference of a row's log-probabilities between the row alone and the row padded, on either side."""
    rows = [
        model.encoder.encode(text) for text in ("Because I was late", "you", "The train had left for Italy")
    ]

    def last(batch_rows: list[list[int]], side: str) -> Tensor:
        batch = pad_batch(batch_rows, model.encoder.pad_id, side)
        logits = model.model(**model.inputs(batch)).logits.float()
        return torch.log_softmax(logits[torch.arange(len(batch_rows)), batch.last_index], dim=-1)

    alone = torch.cat([last([row], "right") for row in rows])
    return max(float((last(rows, side) - alone).abs().max()) for side in ("left", "right"))
