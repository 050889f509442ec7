"""The Models tab: what the doctor says about the run's model, and key statistics with their cost shown first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import gradio as gr

from nmke.cli.doctor import examine, statistics_text
from nmke.cli.estimates import duration, prepare_cost, tokens_per_second
from nmke.cli.settings import parse_layers
from nmke.errors import NmkeError
from nmke.preparing import lacking, needed
from nmke.studio.pages.common import PRIVATE, follow, html, problem_html, say
from nmke.studio.service import Studio


def build(studio: Studio) -> None:
    """Put the tab's parts on the page."""
    config = studio.session.config
    look = gr.Button("Examine the model", elem_id="doctor")
    found = gr.HTML(
        say("Says what can be edited and what it costs; measuring its speed takes a moment."),
        elem_id="doctor-result",
    )
    with gr.Row():
        chosen = ",".join(map(str, config.layers or ()))
        layers = gr.Textbox(chosen, label="Layers, as 4-8 or 4,5,6", elem_id="layers", min_width=140)
        tokens = gr.Number(
            config.corpus_tokens,
            label="Tokens of text",
            precision=0,
            minimum=2,
            elem_id="corpus-tokens",
            min_width=140,
        )
        cost = gr.Button("Show the cost", elem_id="cost", min_width=110)
        prepare = gr.Button("Prepare", variant="primary", elem_id="prepare", interactive=False, min_width=110)
    result = gr.HTML(
        say("Key statistics are gathered once for a model and its layers; the first edit does it otherwise."),
        elem_id="prepare-result",
    )

    do = _Actions(studio)
    look.click(do.examine, outputs=found, show_progress="minimal", **PRIVATE)
    cost.click(do.cost, [layers, tokens], [result, prepare], show_progress="minimal", **PRIVATE)
    prepare.click(do.prepare, [layers, tokens], result, show_progress="hidden", **PRIVATE)
    for field in (layers, tokens):  # a new cost must be seen first
        field.input(lambda: gr.update(interactive=False), outputs=prepare, show_progress="hidden", **PRIVATE)


@dataclass(frozen=True)
class _Actions:
    """What the tab's buttons do."""

    studio: Studio

    def examine(self) -> str:
        session = self.studio.session
        try:
            with self.studio.gate.turn(), session.base():
                found = examine(session.model, session.config)
            return html("doctor.html", found=found, prepare=statistics_text(found), duration=duration)
        except NmkeError as error:
            return problem_html(error)

    def cost(self, layers: str, tokens: float) -> tuple[str, Any]:
        try:
            return cost_html(self.studio, layers, int(tokens or 0)), gr.update(interactive=True)
        except NmkeError as error:
            return problem_html(error), gr.update(interactive=False)

    def prepare(self, layers: str, tokens: float) -> Iterator[str]:
        try:
            job = self.studio.submit_prepare(_settings(layers, int(tokens or 0)))
        except NmkeError as error:
            yield problem_html(error)
            return
        yield from follow(job)


def cost_html(studio: Studio, layers: str, tokens: int) -> str:
    """What gathering would take."""
    session = studio.session
    with studio.gate.turn(), session.using(**_settings(layers, tokens)) as config:
        found = needed(session.model, config, session.store)
        price = prepare_cost(session.model, found, config, tokens_per_second(session.model))
    return html(
        "cost.html", config=config, found=found, missing=lacking(found), cost=price, duration=duration
    )


def _settings(layers: str, tokens: int) -> dict[str, Any]:
    return {"layers": parse_layers(layers.strip() or None), "corpus_tokens": tokens}
