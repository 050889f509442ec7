"""The Import tab: a facts file, its faults line by line, and a job that writes it with pause and resume."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import gradio as gr

from nmke.errors import NmkeError, RequestError
from nmke.facts import read_facts
from nmke.studio.api import FaultsError, facts_faults, import_file
from nmke.studio.pages.common import PRIVATE, follow, html, problem_html, say
from nmke.studio.service import Studio

SHOWN = 5


def build(studio: Studio) -> None:
    """Put the tab's parts on the page."""
    with gr.Row():
        file = gr.File(
            label="Facts file: JSONL, JSON or CSV, gzip or not",
            file_count="single",
            elem_id="facts-file",
            height=140,
        )
        with gr.Column(min_width=220):
            size = gr.Number(
                studio.session.config.batch_size,
                label="Facts per batch",
                precision=0,
                minimum=1,
                elem_id="batch-size",
            )
            resume = gr.Checkbox(True, label="Skip facts that the run holds already", elem_id="skip")
            start = gr.Button("Import", variant="primary", elem_id="import")
    result = gr.HTML(
        say("Each line is checked before anything is written; the job goes on when this page is closed."),
        elem_id="import-result",
    )

    do = _Actions(studio)
    file.change(do.check, file, result, show_progress="hidden", **PRIVATE)
    start.click(do.start, [file, size, resume], result, show_progress="hidden", **PRIVATE)


@dataclass(frozen=True)
class _Actions:
    """What choosing a file and the button do."""

    studio: Studio

    def check(self, path: str | None) -> str:
        if path is None:
            return ""
        try:
            faults = facts_faults(Path(path), Path(path).name)
            if faults:
                raise FaultsError(faults)
            read = read_facts(path)
            self.studio.check(read.requests)
        except NmkeError as error:
            return problem_html(error)
        name = Path(path).name
        return html("facts.html", name=name, read=read, shown=read.requests[:SHOWN])

    def start(self, path: str | None, size: float, resume: bool) -> Iterator[str]:
        try:
            if path is None:
                raise RequestError("no file was chosen; choose a facts file first")
            content, settings = Path(path).read_bytes(), {"batch_size": int(size or 1)}
            job = import_file(self.studio, content, Path(path).name, settings, resume=resume)
        except NmkeError as error:
            yield problem_html(error)
            return
        yield from follow(job)
