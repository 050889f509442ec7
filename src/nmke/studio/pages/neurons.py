"""The Neurons tab: which columns an edit changed and by how much, and what a chosen neuron promotes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gradio as gr
import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from nmke.batch_file import LayerWrite, read_writes
from nmke.cli.inspect import batch_path, written_number
from nmke.errors import NmkeError
from nmke.neurons.words import neuron_values, promoted_tokens
from nmke.studio.limits import not_found
from nmke.studio.pages.common import PRIVATE, html, listed_edits, problem_html, say
from nmke.studio.service import Studio

SHOWN = 60  # strongest neurons to choose from
LISTED = 100  # edits to choose from
CELL = 8  # pixels
ACROSS = 96  # neurons in a row
GAP = 2  # rows of cells between layers
PAPER, INK = (226, 232, 240), ((199, 210, 254), (67, 56, 202))


@dataclass(frozen=True)
class EditMap:
    """How much an edit changed each column.

    Args:
        sizes: Per layer, ‖the edit's own change‖ / ‖column before‖ of every neuron, [d_mlp]; 0 where untouched.
    """

    sizes: dict[int, NDArray[numpy.float64]]

    def strongest(self, count: int) -> list[tuple[int, int, float]]:
        """Layer, neuron and size of the neurons that changed most."""
        everything = [
            (layer, int(i), float(size[i]))
            for layer, size in self.sizes.items()
            for i in numpy.argsort(-size, kind="stable")[:count]
            if size[i] > 0
        ]
        return sorted(everything, key=lambda item: -item[2])[:count]

    def picture(self) -> NDArray[numpy.uint8]:
        """The layers one under the other, a cell per neuron, row by row; darker where more changed."""
        top = max((float(size.max()) for size in self.sizes.values()), default=0.0) or 1.0
        blocks = []
        for size in self.sizes.values():
            cells = numpy.full((_rows(len(size)) * ACROSS, 3), 255, dtype=numpy.float64)
            low, high = (numpy.array(colour, dtype=numpy.float64) for colour in INK)
            depth = numpy.sqrt(size / top)[:, None]
            cells[: len(size)] = numpy.where(depth > 0, low + (high - low) * depth, numpy.array(PAPER))
            blocks += [cells.reshape(-1, ACROSS, 3), numpy.full((GAP, ACROSS, 3), 255.0)]
        image = numpy.concatenate(blocks[:-1]).round().astype(numpy.uint8)
        return image.repeat(CELL, axis=0).repeat(CELL, axis=1)

    def neuron_at(self, x: int, y: int) -> tuple[int, int] | None:
        """Layer and neuron of a pixel of the picture, None between them."""
        row, column = y // CELL, x // CELL
        for layer, size in self.sizes.items():
            index = row * ACROSS + column
            if row >= 0 and row < _rows(len(size)):
                return (layer, index) if index < len(size) else None
            row -= _rows(len(size)) + GAP
        return None


def _rows(neurons: int) -> int:
    return -(-neurons // ACROSS)


def edit_map(writes: dict[int, LayerWrite], edit: int) -> EditMap:
    """The map of one edit, counted among those its batch wrote."""
    return EditMap({layer: _sizes(write, edit) for layer, write in writes.items()})


def _sizes(write: LayerWrite, edit: int) -> NDArray[numpy.float64]:
    before: Tensor = write.before.values.double().norm(dim=0)
    sizes = numpy.zeros(write.right.shape[1])
    index = write.before.index.long()
    sizes[index.numpy()] = (write.column_norms(edit)[index] / before.clamp(min=1e-30)).numpy()
    return sizes


def load_map(studio: Studio, name: str) -> EditMap:
    """The map of an edit of the run, from the file of its batch.

    Raises:
        NmkeError: If there is no such edit, or nothing was written for it.
    """
    if not name:
        raise not_found("edit", "", "choose one from the list")
    place = studio.edit(name)
    with studio.reading() as ledger:
        event = ledger.event(place.at[0])
    record = event.edits[place.at[1]]
    return edit_map(read_writes(batch_path(studio.root, event)), written_number(event, record))


def build(studio: Studio, tab: gr.Tab) -> None:
    """Put the tab's parts on the page."""
    with gr.Row():
        chosen = gr.Dropdown([], label="Edit", elem_id="neuron-edit", scale=3, min_width=220)
        show = gr.Button("Show its neurons", variant="primary", elem_id="show-map", min_width=140)
    note = gr.HTML(say("Choose an edit; each cell of the map is a neuron."), elem_id="map-note")
    picture = gr.Image(
        label="Neuron map",
        show_label=False,  # it would lie over the first layer
        elem_id="neuron-map",
        interactive=False,
        visible=False,
        buttons=["fullscreen"],
        format="png",
        alt_text="Map of the neurons that the edit changed, layer by layer",
    )
    neuron = gr.Dropdown([], label="Neuron", elem_id="neuron", visible=False)
    words = gr.HTML(elem_id="neuron-words")

    do = _Actions(studio)
    tab.select(do.offer, outputs=chosen, show_progress="hidden", **PRIVATE)
    show.click(do.draw, chosen, [note, picture, neuron, words], show_progress="minimal", **PRIVATE)
    neuron.input(do.explain, [chosen, neuron], words, show_progress="hidden", **PRIVATE)
    picture.select(do.choose, chosen, words, show_progress="hidden", **PRIVATE)


@dataclass(frozen=True)
class _Actions:
    """What the tab's parts do when they are used."""

    studio: Studio

    def offer(self) -> Any:
        found = [place for place in self.studio.edits(limit=LISTED) if place.record.status != "known"]
        choices = listed_edits(found)
        return gr.update(choices=choices, value=choices[0][1] if choices else None)

    def draw(self, name: str | None) -> tuple[Any, ...]:
        try:
            found = load_map(self.studio, name or "")
        except NmkeError as error:
            return problem_html(error), gr.update(visible=False), gr.update(visible=False), ""
        choices = [
            (f"layer {layer}, neuron {i}: changed by {size:.1%}", f"{layer}.{i}")
            for layer, i, size in found.strongest(SHOWN)
        ]
        first = choices[0][1] if choices else None
        return (
            html("neuron_map.html", layers=_layer_rows(found)),
            gr.update(value=found.picture(), visible=True),
            gr.update(choices=choices, value=first, visible=True),
            self.explain(name, first),
        )

    def explain(self, name: str | None, place: str | None) -> str:
        if not place:
            return ""
        layer, index = map(int, place.split("."))
        try:
            return words_html(self.studio, name or "", layer, index)
        except NmkeError as error:
            return problem_html(error)

    def choose(self, name: str | None, event: gr.SelectData) -> str:
        try:
            x, y = event.index
            found = load_map(self.studio, name or "").neuron_at(int(x), int(y))
            return "" if found is None else words_html(self.studio, name or "", *found)
        except NmkeError as error:
            return problem_html(error)


def _layer_rows(found: EditMap) -> list[dict[str, Any]]:
    return [
        {
            "layer": layer,
            "changed": int((size > 0).sum()),
            "of": len(size),
            "largest": float(size.max()),
            "mean": float(size[size > 0].mean()) if (size > 0).any() else 0.0,
        }
        for layer, size in found.sizes.items()
    ]


def words_html(studio: Studio, name: str, layer: int, index: int) -> str:
    """What a neuron promotes in the unedited and in the edited model, as it is now."""
    model = studio.session.model
    size = float(load_map(studio, name).sizes[layer][index])
    with studio.gate.turn():
        now = neuron_values(model, [(layer, index)])
        with studio.session.base():
            base = neuron_values(model, [(layer, index)])
        both = promoted_tokens(model, torch.cat([base, now]), 8)
    return html("neuron.html", layer=layer, index=index, size=size, base=both[0], now=both[1])
