"""The HTTP API: reads answer at once, writes become jobs, answers of the model wait for their turn."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Sequence
from functools import partial
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Annotated, Any, Literal

import anyio.to_thread
from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from nmke.errors import NmkeError, RequestError
from nmke.facts import find_faults, read_facts
from nmke.ledger import Row
from nmke.models.chat import Listener, Reply
from nmke.models.generate import Decoding
from nmke.studio import openai, schemas
from nmke.studio.jobs import Job
from nmke.studio.limits import status_and_code
from nmke.studio.service import Place, Studio
from nmke.studio.streams import event, job_events, problem, told

EVENTS = "text/event-stream"
STREAM_HEADERS = {"cache-control": "no-store", "x-accel-buffering": "no"}
JobId = Annotated[str, "Name of a job."]


def _problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    texts = {
        401: "No token, or a wrong one.",
        403: "From a page or under a name that is not the studio's.",
        404: "It does not exist.",
        409: "It does not go with the state of run or job.",
        413: "Too large.",
        422: "The request cannot be used; the message says why.",
        429: "Too many wait already.",
        500: "It failed.",
    }
    return {
        status: {"model": schemas.ProblemOut, "description": texts[status]}
        for status in (401, 403, *statuses, 422)
    }


def _streams(description: str) -> dict[int | str, dict[str, Any]]:
    return {200: {"description": description, "content": {EVENTS: {"schema": {"type": "string"}}}}}


def studio_of(request: Request) -> Studio:
    """The studio that the application serves."""
    studio: Studio = request.app.state.studio
    return studio


Open = Annotated[Studio, Depends(studio_of)]
router = APIRouter(prefix="/v1")


@router.get("/health", responses=_problems(), tags=["run"])
async def health(studio: Open) -> schemas.HealthOut:
    """Answer once the studio is ready, and say where the run stands."""
    states: dict[str, int] = {}
    for job in studio.worker.jobs():
        states[job.state] = states.get(job.state, 0) + 1
    head = studio.head()
    return schemas.HealthOut(
        status="ok",
        model=studio.session.model.name,
        run=studio.root.name,
        jobs=states,
        waiting=studio.gate.waiting,
        **{name: head[name] for name in ("content_hash", "batches", "edits", "failed")},
    )


@router.get("/models", responses=_problems(), tags=["model"])
async def models(studio: Open) -> openai.ModelsOut:
    """The two models that can be asked: the unedited one and the one with the run's edits."""
    owner, base = studio.session.model.name, studio.session.weights.base_hash()
    found = (("edited", studio.head()["content_hash"]), ("base", base))
    data = [
        openai.ModelOut(id=name, created=0, owned_by=owner, content_hash=content) for name, content in found
    ]
    return openai.ModelsOut(data=data)


# ---------------------------------------------------------------------- edits


@router.post("/edits", status_code=202, responses=_problems(409, 413, 429), tags=["edits"])
async def post_edits(body: schemas.EditsIn, studio: Open, response: Response) -> schemas.JobOut:
    """Queue facts to edit; the job says how far it is."""
    requests = [
        fact.request() if fact.id or body.resume else studio.unused_id(fact.request()) for fact in body.edits
    ]
    submit = partial(studio.submit_edits, requests, body.settings, resume=body.resume, watch=body.watch)
    return _accepted(await anyio.to_thread.run_sync(submit), response)


@router.get("/edits", responses=_problems(), tags=["edits"])
async def get_edits(
    studio: Open,
    search: Annotated[str, Query(max_length=200, description="Part of prompt, answer or id.")] = "",
    status: Literal["written", "failed", "known"] | None = None,
    limit: Annotated[int, Query(ge=1, le=500)] = 100,
    before: Annotated[
        str | None, Query(pattern=r"^[0-9]{1,15}-[0-9]{1,9}$", description="`next` of the last page.")
    ] = None,
) -> schemas.EditsOut:
    """Edits of the run, newest first, taken-back ones too."""
    row: Row | None = None
    if before is not None:
        seq, _, position = before.partition("-")
        row = int(seq), int(position)
    found = studio.edits(search, status, limit, row)
    more = f"{found[-1].at[0]}-{found[-1].at[1]}" if len(found) == limit else None
    return schemas.EditsOut(edits=[_edit_out(place) for place in found], next=more)


@router.get("/edits/{edit_id}", responses=_problems(404), tags=["edits"])
async def get_edit(edit_id: str, studio: Open) -> schemas.EditOut:
    """One edit."""
    return _edit_out(studio.edit(edit_id))


@router.delete("/edits/{edit_id}", status_code=202, responses=_problems(404, 409, 429), tags=["edits"])
async def delete_edit(edit_id: str, studio: Open, response: Response) -> schemas.JobOut:
    """Take back one edit wherever it stands; what came with it or later is edited again."""
    return _accepted(studio.submit_revert(edit_id), response)


@router.post(
    "/edits/{edit_id}/retry", status_code=202, responses=_problems(404, 409, 413, 429), tags=["edits"]
)
async def retry_edit(edit_id: str, body: schemas.RetryIn, studio: Open, response: Response) -> schemas.JobOut:
    """Edit a failed fact again, with other settings."""
    return _accepted(studio.submit_retry(edit_id, body.settings), response)


@router.post("/undo", status_code=202, responses=_problems(409, 413, 429), tags=["edits"])
async def undo(body: schemas.UndoIn, studio: Open, response: Response) -> schemas.JobOut:
    """Take back the newest batches, bit for bit."""
    return _accepted(studio.submit_undo(body.batches), response)


@router.post(
    "/imports",
    status_code=202,
    responses=_problems(409, 413, 429),
    tags=["edits"],
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
        }
    },
)
async def import_facts(
    request: Request,
    studio: Open,
    response: Response,
    batch_size: Annotated[int | None, Query(ge=1, le=10_000)] = None,
    resume: bool = False,
) -> schemas.JobOut:
    """Queue a facts file (JSONL, JSON or CSV, the body itself); every fault is named with its line."""
    content = await request.body()
    settings = {} if batch_size is None else {"batch_size": batch_size}
    work = partial(import_file, studio, content, "facts", settings, resume=resume)
    return _accepted(await anyio.to_thread.run_sync(work), response)


def import_file(studio: Studio, content: bytes, name: str, settings: dict[str, Any], *, resume: bool) -> Job:
    """Check a facts file and queue its facts.

    Raises:
        FaultsError: If it has faults.
    """
    with NamedTemporaryFile(dir=studio.worker.store.folder.parent, prefix="facts-") as file:
        file.write(content)
        file.flush()
        faults = facts_faults(Path(file.name), name)
        if faults:
            raise FaultsError(faults)
        read = read_facts(file.name)
    return studio.submit_edits(
        read.requests, settings, resume=resume, summary=f"{name}: {len(read.requests)} facts"
    )


def facts_faults(path: Path, name: str) -> list[str]:
    """Every fault of a facts file, without the folder that it happens to lie in."""
    return [
        str(fault).replace(repr(str(path)), repr(name)).replace(str(path), name)
        for fault in find_faults(path)
    ]


class FaultsError(RequestError):
    """A facts file with faults."""

    def __init__(self, faults: Sequence[str]) -> None:
        super().__init__(f"the facts file has {len(faults)} faults; first: {faults[0]}")
        self.details = [{"line": _line(fault), "message": fault} for fault in faults]


def _line(fault: str) -> int | None:
    found = re.search(r", line ([0-9]+)", fault)
    return int(found[1]) if found else None


# ---------------------------------------------------------------------- jobs


@router.get("/jobs", responses=_problems(), tags=["jobs"])
async def get_jobs(studio: Open) -> list[schemas.JobOut]:
    """Jobs, newest first."""
    return [_job_out(job) for job in reversed(studio.worker.jobs())]


@router.get(
    "/jobs/{job_id}",
    response_model=schemas.JobOut,
    responses={**_problems(404), **_streams("The job; as events if `Accept` asks for them.")},
    tags=["jobs"],
)
async def get_job(job_id: JobId, request: Request, studio: Open) -> Any:
    """One job; with `Accept: text/event-stream`, an event after every change until it is finished."""
    job = studio.worker.job(job_id)
    if EVENTS in request.headers.get("accept", ""):
        return StreamingResponse(job_events(job), media_type=EVENTS, headers=STREAM_HEADERS)
    return _job_out(job)


@router.delete("/jobs/{job_id}", status_code=202, responses=_problems(404, 409), tags=["jobs"])
async def cancel_job(job_id: JobId, studio: Open) -> schemas.JobOut:
    """Cancel a job; the batch it is in the middle of is taken back, bit for bit."""
    return _job_out(studio.worker.cancel(job_id))


@router.post("/jobs/{job_id}/pause", status_code=202, responses=_problems(404, 409), tags=["jobs"])
async def pause_job(job_id: JobId, studio: Open) -> schemas.JobOut:
    """Stop a job after the batch it is in; others go on meanwhile."""
    return _job_out(studio.worker.pause(job_id))


@router.post("/jobs/{job_id}/resume", status_code=202, responses=_problems(404, 409), tags=["jobs"])
async def resume_job(job_id: JobId, studio: Open) -> schemas.JobOut:
    """Go on with a paused job."""
    return _job_out(studio.worker.resume(job_id))


@router.post("/exports", status_code=202, responses=_problems(409, 413, 429), tags=["model"])
async def post_export(body: schemas.ExportIn, studio: Open, response: Response) -> schemas.JobOut:
    """Queue an export into the run folder; the result holds the line that loads or serves it."""
    return _accepted(studio.submit_export(body.format, body.name, force=body.force), response)


@router.post("/prepare", status_code=202, responses=_problems(413, 429), tags=["model"])
async def post_prepare(body: schemas.PrepareIn, studio: Open, response: Response) -> schemas.JobOut:
    """Queue gathering the key statistics that settings need; nothing to do when they are cached."""
    return _accepted(studio.submit_prepare(body.settings), response)


# ---------------------------------------------------------------------- answers


@router.post("/generate", responses=_problems(413, 429), tags=["model"])
async def generate(body: schemas.GenerateIn, studio: Open) -> schemas.GenerateOut:
    """Continue a text."""
    draw = body.temperature > 0
    decoding = Decoding(
        body.max_new_tokens, draw, body.seed if draw else None, body.temperature or 1.0, body.stop_at_newline
    )
    turns = [{"role": "user", "content": body.prompt}]
    reply = await _last(partial(_answer, studio, turns, decoding, body.model, True))
    return schemas.GenerateOut(
        text=reply.text,
        model=body.model,
        prompt_tokens=reply.prompt_tokens,
        new_tokens=reply.new_tokens,
        ended=reply.ended,
    )


@router.post(
    "/chat/completions",
    response_model=openai.CompletionOut,
    responses={**_problems(404, 413, 429), **_streams("The answer; as events with `stream`.")},
    tags=["model"],
)
async def chat_completions(body: openai.CompletionIn, studio: Open) -> Any:
    """Answer a conversation, as OpenAI's API does; `model` is "edited" or "base"."""
    turns = [turn.plain() for turn in body.messages]
    answer = partial(_answer, studio, turns, body.decoding(), body.which(), False)
    if not body.stream:
        return openai.completion(body, await _last(answer))
    items = told(answer)
    first = await anext(items)  # what is refused, is refused with its own status
    return StreamingResponse(_chunks(body, first, items), media_type=EVENTS, headers=STREAM_HEADERS)


def _answer(
    studio: Studio,
    turns: Sequence[dict[str, str]],
    decoding: Decoding,
    which: Literal["edited", "base"],
    raw: bool,
    tell: Listener,
) -> Reply:
    return studio.answer(turns, decoding, which, raw=raw, tell=tell)


async def _last(answer: Any) -> Reply:
    async for item in told(answer):
        if isinstance(item, Reply):
            return item
    raise RuntimeError("an answer ended without a reply")


async def _chunks(
    asked: openai.CompletionIn, first: str | Reply, rest: AsyncIterator[str | Reply]
) -> AsyncIterator[str]:
    name, sent = openai.new_id(), ""
    yield event(None, openai.chunk(name, asked, {"role": "assistant", "content": ""}))
    try:
        item = first
        while True:
            text = item.text if isinstance(item, Reply) else item
            if text.startswith(sent) and text != sent:
                yield event(None, openai.chunk(name, asked, {"content": text[len(sent) :]}))
                sent = text
            if isinstance(item, Reply):
                yield event(None, openai.chunk(name, asked, {}, item))
                break
            item = await anext(rest)
    except NmkeError as error:
        yield event(None, problem(error))
    yield event(None, "[DONE]")


# ---------------------------------------------------------------------- shapes


def _accepted(job: Job, response: Response) -> schemas.JobOut:
    response.headers["location"] = f"/v1/jobs/{job.id}"
    return _job_out(job)


def _job_out(job: Job) -> schemas.JobOut:
    return schemas.JobOut(**job.snapshot())


def _edit_out(place: Place) -> schemas.EditOut:
    request = place.record.request
    return schemas.EditOut(
        id=request.id,
        batch=place.batch,
        created=place.created,
        status=place.record.status,
        active=place.active,
        prompt=request.text,
        subject=request.subject,
        target_new=request.target_new,
        target_true=request.target_true,
        paraphrases=list(request.paraphrases),
        neighborhood=[schemas.NeighborIn(prompt=n.prompt, answer=n.answer) for n in request.neighborhood],
        detail=place.record.detail,
    )


async def say_problem(_request: Request, error: Exception) -> JSONResponse:
    """An error of ours, as JSON."""
    assert isinstance(error, NmkeError)
    content = problem(error)
    content["error"]["details"] = getattr(error, "details", [])
    return JSONResponse(content, status_and_code(error)[0])


__all__ = ["FaultsError", "facts_faults", "import_file", "router", "say_problem"]
