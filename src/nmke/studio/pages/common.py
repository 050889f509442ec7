"""What every tab needs: templates as HTML, a job followed to its end, an answer piece by piece."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

from markupsafe import Markup

from nmke.errors import NmkeError
from nmke.models.chat import Reply
from nmke.models.generate import Decoding
from nmke.studio.app import templates
from nmke.studio.jobs import FINISHED, Job, State
from nmke.studio.limits import status_and_code
from nmke.studio.service import Place, Studio, Which
from nmke.studio.streams import Gone

LOOK_SECONDS = 0.15
# Page events are no public interface: programs have the API.
PRIVATE: dict[str, Any] = {"api_visibility": "private", "concurrency_limit": None}


def html(template: str, **values: Any) -> str:
    """A template filled with values, every one escaped."""
    return templates().get_template(template).render(**values)


def say(text: str) -> str:
    """One plain sentence."""
    return html("say.html", text=text)


def problem_html(error: NmkeError) -> str:
    """An error as a page shows it."""
    content = {"code": status_and_code(error)[1], "message": str(error)}
    return html("problem.html", error=content, details=getattr(error, "details", []))


def job_html(job: Job) -> str:
    """A job as a page shows it."""
    return html("job.html", job=job.snapshot(), result=result_markup)


def result_markup(job: dict[str, Any]) -> Markup:
    """What a job did; the template that makes it escapes its values."""
    return Markup(html("result.html", result=job["result"]))


def listed_edits(places: Sequence[Place]) -> list[tuple[str, str]]:
    """Edits as a list offers them: what is shown, and the id."""
    return [
        (f"{edit.id}  {edit.text} → {edit.target_new}", edit.id)
        for edit in (place.record.request for place in places)
    ]


def follow(job: Job) -> Iterator[str]:
    """The job as HTML after every change, until it is finished or paused; the job goes on if nobody looks."""
    seen: tuple[int, State] | None = None
    while True:
        now = job.version, job.state  # see `job_events`
        if now != seen:
            seen = now
            yield job_html(job)
        if now[1] in (*FINISHED, "paused") and now[0] == job.version:
            return
        time.sleep(LOOK_SECONDS)


def pieces(
    studio: Studio, turns: Sequence[dict[str, str]], decoding: Decoding, which: Which, *, raw: bool
) -> Iterator[str]:
    """The answer so far, again and again; the model stops when the reader leaves.

    Raises:
        NmkeError: What the answer raised.
    """
    items: queue.Queue[str | Reply | Exception] = queue.Queue()
    gone = threading.Event()

    def tell(text: str) -> None:
        if gone.is_set():
            raise Gone
        items.put(text)

    def work() -> None:
        try:
            items.put(studio.answer(turns, decoding, which, raw=raw, tell=tell))
        except Gone:
            return
        except Exception as error:  # raised again where it is read
            items.put(error)

    threading.Thread(target=work, name="nmke-page-answer", daemon=True).start()
    try:
        while True:
            item = items.get()
            if isinstance(item, Exception):
                raise item
            yield item.text if isinstance(item, Reply) else item
            if isinstance(item, Reply):
                return
    finally:
        gone.set()
