"""The Compare tab: one message to the unedited and the edited model, their answers side by side as they are written."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import gradio as gr

from nmke.errors import NmkeError
from nmke.models.chat import has_template
from nmke.models.generate import Decoding
from nmke.studio.pages.common import PRIVATE, html, pieces, problem_html, say
from nmke.studio.service import Studio, Which

Turns = list[dict[str, str]]
LABELS: dict[Which, str] = {"base": "Base model", "edited": "Edited model"}
TOKENS = 64


def build(studio: Studio) -> None:
    """Put the tab's parts on the page."""
    shown: list[gr.HTML] = []
    said = [gr.State([]), gr.State([])]
    with gr.Row():
        for name, label in LABELS.items():
            with gr.Column(min_width=260):
                shown.append(gr.HTML(transcript(label, []), elem_id=f"{name}-chat"))
    with gr.Row():
        message = gr.Textbox(
            label="Message to both", placeholder="What is the capital of France?", elem_id="message", scale=4
        )
        send = gr.Button("Send", variant="primary", elem_id="send", scale=1, min_width=100)
    with gr.Row():
        most = min(512, studio.limits.new_tokens)
        tokens = gr.Slider(1, most, TOKENS, step=1, label="Longest answer, tokens", elem_id="tokens")
        raw = gr.Checkbox(
            not has_template(studio.session.model),
            label="Continue the text, without the chat template",
            elem_id="raw",
        )
        forget = gr.Button("New conversation", elem_id="forget")
    note = gr.HTML(elem_id="compare-note")

    talk = _Talk(studio)
    inputs, outputs = [message, *said, tokens, raw], [*shown, *said, message, note]
    send.click(talk.both, inputs, outputs, show_progress="hidden", **PRIVATE)
    message.submit(talk.both, inputs, outputs, show_progress="hidden", **PRIVATE)
    forget.click(lambda: (*_shown([], []), "", ""), outputs=outputs, show_progress="hidden", **PRIVATE)


@dataclass(frozen=True)
class _Talk:
    """What a message does."""

    studio: Studio

    def both(self, text: str, first: Turns, second: Turns, tokens: float, raw: bool) -> Iterator[Any]:
        if not text.strip():
            yield (*_shown(first, second), text, say("Write a message first."))
            return
        turns: dict[Which, Turns] = {"base": first, "edited": second}
        for own in turns.values():
            own += [{"role": "user", "content": text}, {"role": "assistant", "content": "…"}]
        yield (*_shown(first, second), "", say("The base model answers first, then the edited one."))
        try:
            for which, own in turns.items():
                for piece in pieces(self.studio, own[:-1], Decoding(int(tokens)), which, raw=raw):
                    own[-1]["content"] = piece or "…"
                    yield (*_shown(first, second), gr.skip(), gr.skip())
        except NmkeError as error:
            for own in turns.values():
                del own[-2:]
            yield (*_shown(first, second), text, problem_html(error))
            return
        yield (*_shown(first, second), gr.skip(), say("Both have answered."))


def _shown(base: Turns, edited: Turns) -> tuple[Any, ...]:
    """Both conversations as HTML and as they are kept."""
    return transcript(LABELS["base"], base), transcript(LABELS["edited"], edited), base, edited


def transcript(label: str, turns: Turns) -> str:
    """A conversation; plain text, whatever the model or its user writes."""
    return html("chat.html", label=label, turns=turns)
