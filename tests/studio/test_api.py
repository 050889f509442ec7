import json

import httpx
import pytest
from tests import runs
from tests.studio.conftest import client_of, fact, finish, served, wait_for

from nmke.studio.app import make_app
from nmke.studio.limits import Limits
from nmke.studio.security import Access


def test_health_says_where_the_run_stands(client, studio):
    found = client.get("/v1/health").json()
    assert found["status"] == "ok" and found["edits"] == 0
    assert found["content_hash"] == studio.session.content_hash


def test_an_edit_is_a_job_that_writes_to_the_ledger(client, studio):
    job = finish(client, client.post("/v1/edits", json={"edits": [fact(0)], "watch": True}))
    assert job["state"] == "done", job
    assert job["result"]["written"] == 1
    probe = job["result"]["probes"][0]
    assert probe["after"]["p_new"] > probe["before"]["p_new"]
    assert client.get("/v1/health").json()["content_hash"] == studio.session.content_hash
    shown = client.get("/v1/edits").json()["edits"]
    assert [edit["prompt"] for edit in shown] == ["The train had left for France"]
    assert shown[0]["active"] and client.get(f"/v1/edits/{shown[0]['id']}").json() == shown[0]


def test_deleting_an_edit_reverts_it_and_keeps_the_others(client, studio):
    unedited = studio.session.content_hash
    finish(client, client.post("/v1/edits", json={"edits": [fact(0), fact(1), fact(2)]}))
    first = client.get("/v1/edits").json()["edits"][-1]["id"]
    job = finish(client, client.delete(f"/v1/edits/{first}"))
    assert job["state"] == "done" and job["result"]["reverted"] == first
    assert client.get("/v1/health").json()["edits"] == 2
    assert client.delete(f"/v1/edits/{first}").status_code == 409
    assert finish(client, client.post("/v1/undo", json={"batches": 2}))["state"] == "done"
    assert studio.session.content_hash == unedited


def test_a_fact_can_be_asked_for_anew(client):
    for target in ("the", "of", "the"):
        body = {"edits": [fact(0, target_new=target)]}
        assert finish(client, client.post("/v1/edits", json=body))["state"] == "done"
    ids = [edit["id"] for edit in client.get("/v1/edits").json()["edits"]]
    assert len(set(ids)) == 3 and ids[0] == f"{ids[2]}-2"


def test_facts_with_ids_of_the_run_are_refused_or_skipped(client):
    finish(client, client.post("/v1/edits", json={"edits": [fact(0, id="mine")]}))
    again = {"edits": [fact(0, id="mine"), fact(1, id="other")]}
    refused = client.post("/v1/edits", json=again)
    assert refused.status_code == 409 and refused.json()["error"]["code"] == "already_edited"
    job = finish(client, client.post("/v1/edits", json={**again, "resume": True}))
    assert job["result"]["skipped"] == 1 and job["result"]["written"] + job["result"]["failed"] == 1


def test_edits_are_searched_and_paged_newest_first(client):
    finish(client, client.post("/v1/edits", json={"edits": [fact(n) for n in range(5)]}))
    first = client.get("/v1/edits", params={"limit": 2}).json()
    rest = client.get("/v1/edits", params={"limit": 5, "before": first["next"]}).json()
    subjects = [edit["subject"] for edit in first["edits"] + rest["edits"]]
    assert subjects == ["Kenya", "Peru", "Japan", "Italy", "France"] and rest["next"] is None
    found = client.get("/v1/edits", params={"search": "for iTaly"}).json()["edits"]
    assert [edit["subject"] for edit in found] == ["Italy"]
    assert client.get("/v1/edits", params={"search": "100%_"}).json()["edits"] == []


def test_failed_edits_are_tried_again_with_other_settings(client):
    body = {"edits": [fact(0, target_new="a lighthouse")], "settings": {"steps": 1}}
    job = finish(client, client.post("/v1/edits", json=body))
    assert job["result"]["failed"] == 1
    name = job["result"]["edits"][0]["id"]
    again = client.post(f"/v1/edits/{name}/retry", json={"settings": {"steps": 20, "lr": 2.0}})
    job = finish(client, again)
    assert job["state"] == "done" and job["result"]["edits"][0]["detail"]["steps"] > 1
    assert client.post("/v1/edits/none/retry", json={}).status_code == 404


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"edits": [{"prompt": "The capital is", "target_new": "x"}]}, "names no subject"),
        ({"edits": [{"prompt": "The {capital} is", "target_new": "  "}]}, "target_new"),
        ({"edits": [{"prompt": "The {capital} is", "target_new": "\ud800"}]}, "unicode string"),
        ({"edits": [{"prompt": "The {capital} is"}]}, "target_new: Field required"),
        ({"edits": []}, "at least 1 item"),
        (
            {"edits": [{"prompt": "{a} b", "target_new": "c"}], "settings": {"stepz": 3}},
            "did you mean 'steps'",
        ),
        (
            {"edits": [{"prompt": "{a} b", "target_new": "c"}], "settings": {"corpus": "/etc/passwd"}},
            "cannot name files",
        ),
        ({"edits": [{"prompt": "{a} b", "target_new": "c"}], "more": 1}, "Extra inputs"),
    ],
)
def test_bad_edits_are_refused_with_the_cause(client, body, message):
    found = client.post("/v1/edits", content=json.dumps(body), headers={"content-type": "application/json"})
    assert found.status_code == 422
    assert message in found.json()["error"]["message"]


def test_generation_continues_text_with_either_model(client):
    finish(client, client.post("/v1/edits", json={"edits": [fact(0)]}))
    asked = {"prompt": "The train had left for France", "max_new_tokens": 1}
    edited = client.post("/v1/generate", json=asked).json()
    base = client.post("/v1/generate", json={**asked, "model": "base"}).json()
    assert edited["text"] == "the" and edited["new_tokens"] == 1
    assert base["text"] != edited["text"]


def test_chat_completions_speak_openais_shape(client):
    asked = {
        "model": "base",
        "messages": [{"role": "user", "content": "The train"}],
        "max_tokens": 3,
        "user": "x",
    }
    found = client.post("/v1/chat/completions", json=asked).json()
    assert found["object"] == "chat.completion" and found["usage"]["completion_tokens"] <= 3
    whole = found["choices"][0]["message"]["content"]
    streamed = client.post("/v1/chat/completions", json={**asked, "stream": True})
    assert streamed.headers["content-type"].startswith("text/event-stream")
    lines = [line[6:] for line in streamed.text.splitlines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    deltas = [json.loads(line)["choices"][0] for line in lines[:-1]]
    assert "".join(d["delta"].get("content", "") for d in deltas).strip() == whole
    assert deltas[-1]["finish_reason"] == found["choices"][0]["finish_reason"]
    refused = client.post("/v1/chat/completions", json={**asked, "model": "gpt-4"})
    assert refused.status_code == 404 and refused.json()["error"]["code"] == "model_not_found"


def test_job_events_follow_a_job_to_its_end(client):
    job = client.post("/v1/edits", json={"edits": [fact(0)]}).json()
    events = client.get(f"/v1/jobs/{job['id']}", headers={"accept": "text/event-stream"})
    shown = [json.loads(line[6:]) for line in events.text.splitlines() if line.startswith("data: ")]
    assert shown[-1]["state"] == "done" and len(shown) >= 1


def test_imports_name_every_fault_with_its_line(client):
    lines = [
        json.dumps(fact(0)),
        "{broken",
        json.dumps({"prompt": "x {}", "subject": "y"}),
        json.dumps(fact(1)),
    ]
    found = client.post("/v1/imports", content="\n".join(lines).encode())
    assert found.status_code == 422
    assert [detail["line"] for detail in found.json()["error"]["details"]] == [2, 3]
    assert "studio" not in found.text, "no path of this machine"
    good = client.post(
        "/v1/imports", params={"batch_size": 1}, content="\n".join([lines[0], lines[3]]).encode()
    )
    job = finish(client, good)
    assert job["state"] == "done" and len(job["result"]["batches"]) == 2


def test_exports_go_into_the_run_folder(client, studio):
    finish(client, client.post("/v1/edits", json={"edits": [fact(0)]}))
    job = finish(client, client.post("/v1/exports", json={"format": "delta", "name": "mine"}))
    assert job["state"] == "done", job
    assert job["result"]["path"] == "exports/mine" and (studio.root / "exports/mine").exists()
    assert "mine" in job["result"]["load"]
    again = client.post("/v1/exports", json={"format": "delta", "name": "mine"})
    assert again.status_code == 409 and again.json()["error"]["code"] == "exists"
    for name in ("../up", "/etc/x", ".hidden", "a/b", ""):
        assert client.post("/v1/exports", json={"name": name}).status_code == 422


def test_preparing_gathers_statistics_once(client):
    settings = {"corpus_tokens": 444}
    first = finish(client, client.post("/v1/prepare", json={"settings": settings}))
    assert first["result"] == {"layers": list(runs.LAYERS), "gathered": list(runs.LAYERS)}
    again = finish(client, client.post("/v1/prepare", json={"settings": settings}))
    assert again["result"]["gathered"] == []


def test_each_limit_has_its_own_error(open_studio):
    studio = open_studio(Limits(body_bytes=3000, prompt_characters=50, new_tokens=5, facts=2, queued_jobs=1))
    with client_of(studio) as client, studio.gate.turn():

        def code(path, **more):
            found = client.post(path, **more)
            return found.status_code, found.json()["error"]["code"]

        assert code("/v1/generate", json={"prompt": "x" * 51}) == (413, "prompt_too_long")
        assert code("/v1/generate", json={"prompt": "x", "max_new_tokens": 6}) == (422, "too_many_tokens")
        assert code("/v1/edits", content=b"x" * 3001) == (413, "body_too_large")
        chunks = (b"x" * 1000 for _ in range(4))
        headers = {"content-type": "application/json"}
        assert code("/v1/edits", content=chunks, headers=headers) == (413, "body_too_large")
        assert code("/v1/edits", json={"edits": [fact(n) for n in range(3)]}) == (413, "too_many_facts")
        first = studio.worker.submit("undo", {"n": 1})
        wait_for(first, "running")
        assert client.post("/v1/edits", json={"edits": [fact(0)]}).status_code == 202
        assert code("/v1/edits", json={"edits": [fact(1)]}) == (429, "queue_full")


def test_too_many_waiting_for_the_model_are_refused(open_studio):
    studio = open_studio(Limits(waiting_answers=0))
    with client_of(studio) as client, studio.gate.turn():
        found = client.post("/v1/generate", json={"prompt": "x"})
    assert (found.status_code, found.json()["error"]["code"]) == (429, "queue_full")


def test_unknown_paths_and_methods_are_errors_of_the_same_shape(client):
    assert client.get("/v1/none").json()["error"]["code"] == "not_found"
    assert client.put("/v1/health").json()["error"]["code"] == "wrong_method"
    assert client.get("/v1/jobs/j000009").json()["error"]["code"] == "not_found"
    assert client.get("/v1/jobs/..%2F..%2Fnmke.json").status_code == 404


def test_the_docs_page_loads_nothing(client):
    page = client.get("/docs")
    assert page.status_code == 200 and "/v1/chat/completions" in page.text
    assert "<script" not in page.text and "http://" not in page.text and "https://" not in page.text


def test_a_real_server_streams_events_while_the_job_runs(studio):
    with served(lambda port: make_app(studio, Access(port=port), pages=False)) as address:
        body = {"edits": [fact(n) for n in range(4)], "settings": {"batch_size": 1}}
        place = httpx.post(f"{address}/v1/edits", json=body).headers["location"]
        states = []
        with httpx.stream(
            "GET", address + place, headers={"accept": "text/event-stream"}, timeout=60
        ) as stream:
            states += [json.loads(line[6:]) for line in stream.iter_lines() if line.startswith("data: ")]
    assert states[-1]["state"] == "done"
    assert any(task["title"] == "facts" for state in states for task in state["progress"]["tasks"])
