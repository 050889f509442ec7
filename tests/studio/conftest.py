"""A studio on a tiny model, a client that talks to it, and a server on loopback."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi.testclient import TestClient
from tests import runs

from nmke.stats.store import StatsStore
from nmke.studio.app import make_app
from nmke.studio.jobs import FINISHED, Job
from nmke.studio.limits import Limits
from nmke.studio.security import Access
from nmke.studio.service import Studio

HOST = "http://127.0.0.1:7860"
SECONDS = 60


@pytest.fixture(scope="session")
def store() -> StatsStore:
    return runs.shared_store()


@pytest.fixture
def open_studio(tmp_path: Path, store: StatsStore) -> Iterator[Callable[..., Studio]]:
    """Opens the run of this test, again and again if wanted."""
    opened: list[Studio] = []

    def call(limits: Limits | None = None, **settings: Any) -> Studio:
        for other in opened:
            other.close()
        opened[:] = [
            Studio(runs.open_run(tmp_path / "run", store=store, **{"steps": 15, **settings}), limits)
        ]
        return opened[0]

    yield call
    for studio in opened:
        studio.close()


@pytest.fixture
def studio(open_studio: Callable[..., Studio]) -> Studio:
    return open_studio()


@contextmanager
def client_of(studio: Studio, access: Access | None = None) -> Iterator[TestClient]:
    with TestClient(make_app(studio, access or Access(), pages=False), base_url=HOST) as client:
        yield client


@pytest.fixture
def client(studio: Studio) -> Iterator[TestClient]:
    with client_of(studio) as found:
        yield found


def wait_for(job: Job, *states: str) -> Job:
    """Wait until a job is in one of the states, or finished."""
    end = time.monotonic() + SECONDS
    while job.state not in (states or FINISHED):
        assert time.monotonic() < end, f"job {job.id} is {job.state} after {SECONDS} s: {job.snapshot()}"
        assert job.state not in FINISHED, job.snapshot()
        time.sleep(0.005)
    return job


def finish(client: Any, response: httpx.Response) -> dict[str, Any]:
    """The job that a request was answered with, once it is finished."""
    assert response.status_code == 202, response.text
    end = time.monotonic() + SECONDS
    while (job := client.get(response.headers["location"]).json())["state"] not in FINISHED:
        assert time.monotonic() < end, job
        time.sleep(0.01)
    return dict(job)


def fact(number: int, **more: Any) -> dict[str, Any]:
    """A fact as the API takes it; see `runs.facts`."""
    request = runs.facts(number + 1)[number]
    return {"prompt": request.prompt, "subject": request.subject, "target_new": request.target_new, **more}


@contextmanager
def served(app: Any) -> Iterator[str]:
    """The address of a real server on loopback."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = uvicorn.Config(app(port), host="127.0.0.1", port=port, log_level="error", lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()
