import asyncio
import json
import threading

import pytest
from tests import runs
from tests.studio.conftest import wait_for

from nmke.errors import LedgerError
from nmke.studio.jobs import Cancelled, JobProgress, JobStore
from nmke.studio.limits import StudioError
from nmke.studio.pages.common import follow, job_html
from nmke.studio.streams import job_events


def submit(studio, count, batch_size=1, **more):
    settings = {"batch_size": batch_size, **more}
    return studio.submit_edits(runs.facts(count), settings)


def at_task(job, title, done=0):
    """Wait until the job is inside a task of that title with so much done."""
    end = threading.Event()
    for _ in range(6000):
        if any(task.title == title and task.done >= done for task in list(job.tasks)):
            return
        end.wait(0.005)
    raise AssertionError(job.snapshot())


@pytest.fixture
def ending(tmp_path):
    """A job at work, and how it ends without its state being kept yet, as on a slow disk."""
    job = JobStore(tmp_path).new("edit", {"summary": "1 fact"})
    job.state = "running"

    def end():
        job.result, job.state = {"written": 1, "failed": 0, "known": 0, "batches": 1}, "done"

    return job, end


def test_a_page_shows_the_end_of_a_job_that_is_still_being_kept(ending):
    job, end = ending
    shown = follow(job)
    running = next(shown)
    end()
    assert [*shown] == [job_html(job)] and job_html(job) != running


def test_events_tell_the_end_of_a_job_that_is_still_being_kept(ending):
    job, end = ending

    async def told():
        events = job_events(job)
        first = await anext(events)
        end()
        return [first, *[event async for event in events]]

    states = [json.loads(event.partition("data: ")[2])["state"] for event in asyncio.run(told())]
    assert states == ["running", "done"]


class Hold:
    """Stops the worker inside a batch until it is let go: a listener on the session's progress."""

    def __init__(self, monkeypatch, title):
        self.inside, self.go, self.title, self.used = threading.Event(), threading.Event(), title, False
        original = JobProgress.task
        hold = self

        def task(progress, title, total):
            if title == hold.title and not hold.used:
                hold.used = True
                hold.inside.set()
                assert hold.go.wait(60)
            return original(progress, title, total)

        monkeypatch.setattr(JobProgress, "task", task)


def test_a_job_cancelled_in_a_batch_leaves_the_exact_bytes(studio, monkeypatch):
    wait_for(submit(studio, 2))
    before, bits = studio.session.content_hash, runs.bits(studio.session.model)
    hold = Hold(monkeypatch, "layers")
    job = studio.submit_edits(runs.facts(4)[2:], {"batch_size": 2})
    assert hold.inside.wait(60), "the batch is computed and about to be solved"
    studio.worker.cancel(job.id)
    hold.go.set()
    assert wait_for(job).state == "cancelled"
    assert studio.session.content_hash == before
    assert runs.bits(studio.session.model) == bits
    assert studio.session.verify()["content_hash"] == before
    later = wait_for(studio.submit_edits(runs.facts(4)[2:], {"batch_size": 2}))
    assert later.state == "done", "the facts can be edited after all"


def test_a_cancelled_job_keeps_the_batches_it_had_finished(studio, monkeypatch):
    job = submit(studio, 50)
    at_task(job, "facts", 2)
    studio.worker.cancel(job.id)
    wait_for(job)
    assert job.state == "cancelled" and 2 <= studio.head()["batches"] < 50
    assert job.result["left"] == 50 - studio.head()["batches"]


def test_a_job_pauses_between_batches_lets_others_in_and_goes_on(studio, monkeypatch):
    hold = Hold(monkeypatch, "layers")
    job = submit(studio, 3)
    assert hold.inside.wait(60)
    studio.worker.pause(job.id)
    hold.go.set()
    wait_for(job, "paused")
    assert job.result["left"] == 2
    other = studio.submit_edits(runs.facts(9)[8:])
    assert wait_for(other).state == "done"
    studio.worker.resume(job.id)
    assert wait_for(job).state == "done"
    ids = [place.record.request.id for place in studio.edits()]
    assert ids == ["e002", "e001", "e008", "e000"]
    assert job.result["left"] == 0 and len(job.result["batches"]) == 3


def test_a_restart_in_the_middle_of_a_job_loses_nothing(open_studio, monkeypatch):
    whole = open_studio()
    wait_for(submit(whole, 4))
    expected = whole.session.content_hash
    wait_for(whole.submit_undo(4))

    studio = open_studio()
    hold = Hold(monkeypatch, "layers")
    hold.used = True  # the first batch goes through
    job = submit(studio, 4)
    at_task(job, "facts", 1)
    hold.used = False
    assert hold.inside.wait(60)
    closing = threading.Thread(target=studio.worker.close)
    closing.start()
    while job.wish != "stop":
        pass
    hold.go.set()
    closing.join()
    saved = json.loads((studio.root / "studio/jobs" / job.id / "state.json").read_text())
    assert saved["state"] == "queued" and saved["own"]

    again = open_studio()
    job = wait_for(again.worker.job(job.id))
    assert job.state == "done" and job.result["left"] == 0
    assert again.session.content_hash == expected
    assert again.session.verify()["content_hash"] == expected


def test_a_killed_process_leaves_a_job_that_goes_on_from_its_last_batch(open_studio):
    studio = open_studio()
    first = wait_for(submit(studio, 2))
    place = studio.root / "studio/jobs" / first.id / "state.json"
    state = json.loads(place.read_text())
    killed = {**state, "state": "running", "seq_before": 0, "own": [], "result": None, "finished": None}
    place.write_text(json.dumps(killed))  # as a process leaves it that is killed just after its last commit
    again = open_studio()
    job = wait_for(again.worker.job(first.id))
    assert job.state == "done" and job.result["batches"] == first.result["batches"]
    assert again.head()["batches"] == 2, "nothing is written twice"


def test_an_undo_that_was_committed_before_a_kill_is_not_done_again(open_studio):
    studio = open_studio()
    wait_for(submit(studio, 3))
    job = wait_for(studio.submit_undo(1))
    place = studio.root / "studio/jobs" / job.id / "state.json"
    state = json.loads(place.read_text())
    place.write_text(json.dumps({**state, "state": "running", "seq_before": 3, "own": [], "result": None}))
    again = open_studio()
    assert wait_for(again.worker.job(job.id)).result["undone"] == ["e002"]
    assert again.head()["batches"] == 2


def test_taking_back_cannot_be_cancelled_half_way(studio, monkeypatch):
    wait_for(submit(studio, 3))
    hold = Hold(monkeypatch, "layers")
    job = studio.submit_revert("e000")
    assert hold.inside.wait(60)
    with pytest.raises(StudioError, match="would leave the run half done"):
        studio.worker.cancel(job.id)
    hold.go.set()
    assert wait_for(job).state == "done" and studio.head()["batches"] == 2


def test_a_queued_job_is_cancelled_at_once_and_finished_ones_not_at_all(studio):
    with studio.gate.turn():
        submit(studio, 1)
        waiting = studio.submit_edits(runs.facts(6)[5:])
        assert studio.worker.cancel(waiting.id).state == "cancelled"
    with pytest.raises(StudioError, match="is cancelled already"):
        studio.worker.cancel(waiting.id)
    with pytest.raises(StudioError, match="does not exist"):
        studio.worker.cancel("j999999")


def test_a_job_that_fails_says_why_and_the_next_one_goes_on(studio):
    job = studio.worker.submit("undo", {"n": 5})
    assert wait_for(job).state == "failed"
    assert job.error["code"] == "invalid_request" and "the run holds 0" in job.error["message"]
    assert wait_for(submit(studio, 1)).state == "done"


def test_an_error_that_nobody_foresaw_ends_the_job_and_not_the_worker(studio, monkeypatch):
    monkeypatch.setattr(studio.session, "undo", lambda n: 1 / 0)
    job = wait_for(studio.worker.submit("undo", {"n": 1}))
    assert job.state == "failed" and job.error["code"] == "unexpected"
    assert wait_for(submit(studio, 1)).state == "done"


def test_progress_shows_steps_and_probabilities_then_ends_the_job(tmp_path):
    job = JobStore(tmp_path).new("edit", {})
    job.state = "running"
    with JobProgress(job).task("target values", 2) as task:
        task.advance(0, "step 1 of 9, p = 0.25")
        task.advance(0, "step 2 of 9, p = 0.50")
        task.advance(1, "p = 0.99")
        assert job.curve == [0.25, 0.5]
        assert vars(job.tasks[0]) == {"title": "target values", "total": 2, "done": 1, "note": "p = 0.99"}
        job.wish = "cancel"
        with pytest.raises(Cancelled):
            task.advance(0)
    assert job.tasks == []


def test_damaged_jobs_are_named(tmp_path):
    store = JobStore(tmp_path)
    job = store.new("undo", {"n": 1})
    (tmp_path / job.id / "state.json").write_text("{")
    with pytest.raises(LedgerError, match=r"cannot be read .* move the folder away"):
        JobStore(tmp_path)


def test_old_finished_jobs_are_forgotten(tmp_path, monkeypatch):
    monkeypatch.setattr("nmke.studio.jobs.MOST_KEPT", 2)
    store = JobStore(tmp_path)
    for number in range(5):
        job = store.new("undo", {"n": number})
        job.state = "queued" if number == 0 else "done"
        store.save(job)
    assert list(JobStore(tmp_path).jobs) == ["j000001", "j000004", "j000005"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["j000001", "j000004", "j000005"]
