"""The strip on top of every tab: what is being written now, and the buttons that pause, resume and cancel it."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import gradio as gr

from nmke.errors import NmkeError
from nmke.studio.jobs import Job
from nmke.studio.pages.common import PRIVATE, html
from nmke.studio.service import Studio

SECONDS = 1.0


def build(studio: Studio) -> None:
    """Put the strip on the page."""

    def show() -> list[Any]:
        job = current(studio)
        running = job is not None and job.state == "running"
        states = (
            running and job is not None and job.kind in ("edit", "prepare"),
            job is not None and job.state == "paused",
            job is not None and job.can_be_cancelled,
        )
        return [activity_html(studio, job), *(gr.update(visible=state) for state in states)]

    def act(action: str) -> list[Any]:
        job = current(studio)
        if job is not None:
            with suppress(NmkeError):  # it has just finished, as the strip now says
                getattr(studio.worker, action)(job.id)
        return show()

    with gr.Column(elem_id="activity"):
        strip = gr.HTML(activity_html(studio, current(studio)))
        with gr.Row(elem_id="activity-buttons"):
            pause = gr.Button("Pause", size="sm", visible=False, elem_id="pause")
            resume = gr.Button("Resume", size="sm", visible=False, elem_id="resume")
            cancel = gr.Button("Cancel job", size="sm", variant="stop", visible=False, elem_id="cancel")
    outputs = [strip, pause, resume, cancel]
    for button, action in ((pause, "pause"), (resume, "resume"), (cancel, "cancel")):
        button.click(lambda action=action: act(action), outputs=outputs, show_progress="hidden", **PRIVATE)
    gr.Timer(SECONDS).tick(show, outputs=outputs, show_progress="hidden", queue=False, **PRIVATE)


def current(studio: Studio) -> Job | None:
    """The job at work, else the next one, else the newest that is paused."""
    jobs = studio.worker.jobs()
    for state in ("running", "queued"):
        found = next((job for job in jobs if job.state == state), None)
        if found is not None:
            return found
    return next((job for job in reversed(jobs) if job.state == "paused"), None)


def activity_html(studio: Studio, job: Job | None) -> str:
    """The strip's text."""
    shown = None if job is None else job.snapshot()
    tasks = shown["progress"]["tasks"] if shown else []
    jobs = studio.worker.jobs()
    queued = sum(other.state == "queued" and other is not job for other in jobs)
    return html(
        "activity.html",
        job=shown,
        task=tasks[-1] if tasks else None,
        queued=queued,
        head=studio.head(),
        last=jobs[-1] if jobs else None,
    )
