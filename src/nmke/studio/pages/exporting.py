"""The Export tab: the edited model in a format that others load, checked, with the line that serves it."""

from __future__ import annotations

from collections.abc import Iterator

import gradio as gr

from nmke.errors import NmkeError
from nmke.studio.pages.common import PRIVATE, follow, problem_html
from nmke.studio.service import Studio

FORMATS = [
    ("Hugging Face folder: transformers, vLLM", "hf"),
    ("Sparse delta: only the changed columns", "delta"),
    ("LoRA adapter: peft, vLLM", "lora"),
    ("GGUF file: llama.cpp", "gguf"),
]


def build(studio: Studio) -> None:
    """Put the tab's parts on the page."""
    with gr.Row():
        form = gr.Dropdown(FORMATS, value="hf", label="Format", elem_id="format", min_width=220)
        name = gr.Textbox("model", label="Name, inside the run folder's exports/", elem_id="export-name")
        force = gr.Checkbox(False, label="Replace an earlier export of that name", elem_id="replace")
        start = gr.Button("Export", variant="primary", elem_id="export", min_width=100)
    result = gr.HTML(elem_id="export-result")

    def write(form: str, name: str, force: bool) -> Iterator[str]:
        try:
            job = studio.submit_export(form, name.strip(), force=force)
        except NmkeError as error:
            yield problem_html(error)
            return
        yield from follow(job)

    start.click(write, [form, name, force], result, show_progress="hidden", **PRIVATE)
