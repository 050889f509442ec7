"""The Edit tab: a sentence, its subject marked by selecting it, the new answer, checks, and what came of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, get_args

import gradio as gr

from nmke.config import EditConfig, MaskName
from nmke.editors import methods
from nmke.errors import NmkeError
from nmke.evaluation.suggestions import suggest
from nmke.facts import parse_prompt
from nmke.studio.pages.common import PRIVATE, follow, problem_html, say
from nmke.studio.service import Studio
from nmke.types import EditRequest, Neighbor

MARK = """() => {
  const text = document.querySelector('#sentence textarea');
  const marked = text.value.substring(text.selectionStart, text.selectionEnd).trim();
  return marked || document.querySelector('#subject textarea, #subject input').value;
}"""


def build(studio: Studio) -> None:
    """Put the tab's parts on the page."""
    config = studio.session.config
    with gr.Row():
        with gr.Column(scale=3, min_width=280):
            sentence = gr.Textbox(
                label="Sentence, up to the answer",
                placeholder="The capital of France is",
                info="Then select the subject in it: with the mouse, or with Shift and the arrow keys.",
                lines=2,
                elem_id="sentence",
            )
            with gr.Row():
                subject = gr.Textbox(label="Subject", placeholder="France", elem_id="subject", min_width=120)
                target = gr.Textbox(label="New answer", placeholder="Lyon", elem_id="target", min_width=120)
            edit = gr.Button("Edit", variant="primary", elem_id="edit")
        with gr.Column(scale=2, min_width=280):
            same = "Must change too: the same in other words, one per line"
            paraphrases = gr.Textbox(label=same, lines=3, elem_id="paraphrases")
            others = "Must stay: prompts about others, one per line"
            neighbours = gr.Textbox(label=others, lines=3, elem_id="neighbours")
            propose = gr.Button("Suggest checks", elem_id="suggest")
    with gr.Accordion("Settings", open=False), gr.Row():
        method = _choice(methods.names(), config.method, "Method", "method")
        mask = _choice(get_args(MaskName), config.mask, "Neuron mask", "mask")
        steps = gr.Number(config.steps, label="Optimisation steps", precision=0, minimum=1, elem_id="steps")
    result = gr.HTML(elem_id="edit-result")

    do = _Actions(studio)
    # In the browser: every key makes a new selection, and answers of a server could overtake each other.
    sentence.select(None, outputs=subject, js=MARK, show_progress="hidden", **PRIVATE)
    propose.click(do.suggest, [sentence, subject], [paraphrases, neighbours, result], **PRIVATE)
    fields = [sentence, subject, target, paraphrases, neighbours, method, mask, steps]
    edit.click(do.edit, fields, result, show_progress="hidden", **PRIVATE)
    target.submit(do.edit, fields, result, show_progress="hidden", **PRIVATE)


def _choice(names: Iterable[str], chosen: str, label: str, name: str) -> gr.Dropdown:
    return gr.Dropdown(list(names), value=chosen, label=label, elem_id=name, min_width=140)


@dataclass(frozen=True)
class _Actions:
    """What the tab's buttons do."""

    studio: Studio

    def suggest(self, sentence: str, subject: str) -> tuple[Any, Any, str]:
        try:
            template, found = parse_prompt(sentence, subject or None)
            self.studio.limits.check_prompt(sentence)
            with self.studio.gate.turn():
                checks = suggest(self.studio.session.model, template, found)
        except NmkeError as error:
            return gr.skip(), gr.skip(), problem_html(error)
        counts = f"{len(checks.paraphrases)} paraphrases and {len(checks.neighbours)} neighbours"
        text = f"Suggested {counts}; change them freely."
        return "\n".join(checks.paraphrases), "\n".join(checks.neighbours), say(text)

    def edit(
        self,
        sentence: str,
        subject: str,
        target: str,
        paraphrases: str,
        neighbours: str,
        method: str,
        mask: str,
        steps: float | None,
    ) -> Iterator[str]:
        try:
            request = make_request(sentence, subject, target, paraphrases, neighbours)
            given = {"method": method, "mask": mask, "steps": steps}
            settings = changed_settings(self.studio.session.config, given)
            job = self.studio.submit_edits([self.studio.unused_id(request)], settings, watch=True)
        except NmkeError as error:
            yield problem_html(error)
            return
        yield from follow(job)


def make_request(sentence: str, subject: str, target: str, paraphrases: str, neighbours: str) -> EditRequest:
    """The request that the fields describe.

    Raises:
        RequestError: If the subject is not in the sentence, or something is empty.
    """
    template, found = parse_prompt(sentence, subject or None)
    return EditRequest(
        template.rstrip(),
        found,
        target.strip(),
        paraphrases=tuple(lines(paraphrases)),
        neighborhood=tuple(Neighbor(line) for line in lines(neighbours)),
    )


def lines(text: str) -> list[str]:
    """The lines that say something."""
    return [line.strip() for line in text.splitlines() if line.strip()]


def changed_settings(config: EditConfig, given: dict[str, Any]) -> dict[str, Any]:
    """The settings that differ from the run's own."""
    return {
        name: value for name, value in given.items() if value is not None and getattr(config, name) != value
    }
