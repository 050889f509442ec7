"""Fifty clients that read while one edits, on loopback, on a tiny model."""

import threading

import httpx
from tests import runs
from tests.studio.conftest import served, wait_for

from nmke.studio.app import make_app
from nmke.studio.security import Access

CLIENTS, EACH = 50, 6


def test_fifty_clients_read_while_one_edits(studio):
    wait_for(studio.submit_edits(runs.facts(1)))
    job = studio.submit_edits(runs.facts(16)[1:], {"batch_size": 1})
    answers: list[int] = []
    paths = (
        "/v1/health",
        "/v1/edits?limit=20",
        "/v1/jobs",
        "/v1/edits/e000",
        f"/v1/jobs/{job.id}",
        "/v1/models",
    )

    def read(address: str) -> None:
        with httpx.Client(base_url=address, timeout=30) as client:
            for path in paths:
                answers.append(client.get(path).status_code)

    with served(lambda port: make_app(studio, Access(port=port), pages=False)) as address:
        clients = [threading.Thread(target=read, args=(address,)) for _ in range(CLIENTS)]
        for client in clients:
            client.start()
        for client in clients:
            client.join()
    assert answers == [200] * CLIENTS * EACH
    assert wait_for(job).state == "done" and studio.head()["batches"] == 16
    assert studio.session.verify()["events"] == 16


def test_answers_wait_for_one_batch_and_not_for_the_whole_job(studio):
    job = studio.submit_edits(runs.facts(40), {"batch_size": 1})
    wait_for(job, "running")
    with served(lambda port: make_app(studio, Access(port=port), pages=False)) as address:
        asked = {"prompt": "The train", "max_new_tokens": 2}
        found = [httpx.post(f"{address}/v1/generate", json=asked, timeout=30) for _ in range(3)]
    assert [answer.status_code for answer in found] == [200] * 3
    assert job.state == "running", "they had their turn between two batches"
    studio.worker.cancel(job.id)
    wait_for(job)
