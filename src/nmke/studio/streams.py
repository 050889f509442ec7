"""Server-sent events: of a job until it is finished, and of an answer while the model writes it."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

from nmke.errors import NmkeError
from nmke.models.chat import Listener, Reply
from nmke.studio.jobs import FINISHED, Job, State
from nmke.studio.limits import status_and_code

POLL_SECONDS = 0.1
QUIET_SECONDS = 15.0  # a comment keeps proxies from hanging up


class Gone(Exception):
    """Nobody listens any more."""


async def job_events(job: Job) -> AsyncIterator[str]:
    """The job as it is now and after every change, until it is finished."""
    seen: tuple[int, State] | None = None
    quiet = 0.0
    while True:
        now = job.version, job.state  # a state is set before it is kept, and only then is the version raised
        if now != seen:
            seen, quiet = now, 0.0
            yield event("job", job.snapshot())
        if now[1] in FINISHED:
            return
        await asyncio.sleep(POLL_SECONDS)
        quiet += POLL_SECONDS
        if quiet >= QUIET_SECONDS:
            quiet = 0.0
            yield ": still here\n\n"


async def told(answer: Callable[[Listener], Reply]) -> AsyncIterator[str | Reply]:
    """The text so far, again and again, and the reply in the end.

    The answer is made in a thread of its own and ends at its next token when the listener leaves.

    Args:
        answer: Makes the answer, given whom to tell.

    Raises:
        NmkeError: What the answer raised.
    """
    loop, queue, gone = (
        asyncio.get_running_loop(),
        asyncio.Queue[str | Reply | Exception](),
        threading.Event(),
    )

    def send(item: str | Reply | Exception) -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(queue.put_nowait, item)

    def tell(text: str) -> None:
        if gone.is_set():
            raise Gone
        send(text)

    def work() -> None:
        try:
            send(answer(tell))
        except Gone:
            return
        except Exception as error:  # raised again where it is listened to
            send(error)

    threading.Thread(target=work, name="nmke-answer", daemon=True).start()
    try:
        while True:
            item = await queue.get()
            if isinstance(item, Exception):
                raise item
            yield item
            if isinstance(item, Reply):
                return
    finally:
        gone.set()


def event(name: str | None, data: Any) -> str:
    """One server-sent event."""
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)
    return (f"event: {name}\n" if name else "") + f"data: {text}\n\n"


def problem(error: NmkeError) -> dict[str, Any]:
    """An error as every answer gives it."""
    return {"error": {"code": status_and_code(error)[1], "message": str(error), "details": []}}
