"""The one thread that writes: takes queued jobs in order, and turns what comes of them into states."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

from nmke.errors import NmkeError
from nmke.studio.jobs import FINISHED, Cancelled, Job, JobStore, Kind, Paused, Stopped, now
from nmke.studio.limits import StudioError, not_found, status_and_code

logger = logging.getLogger(__name__)
Perform = Callable[[Job], dict[str, Any]]


class Worker:
    """A queue of jobs and the thread that does them.

    Args:
        store: Where they are kept.
        perform: Does one job; its result is kept. Raises `Cancelled`, `Paused` or `Stopped` when it ended early.
        most_queued: Jobs that may wait or be paused.
    """

    def __init__(self, store: JobStore, perform: Perform, most_queued: int) -> None:
        self.store, self._perform, self._most = store, perform, most_queued
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="nmke-writer", daemon=True)

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    def close(self) -> None:
        """End the running job at its next callback, keep it queued for the next start, and wait for the thread."""
        with self._changed:
            self._closing = True
            for job in self.jobs():
                if job.state == "running" and job.wish != "cancel":
                    job.wish = "stop"
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join()

    def jobs(self) -> list[Job]:
        """Every job that is kept, oldest first."""
        return list(self.store.jobs.values())

    def job(self, name: str) -> Job:
        """One job.

        Raises:
            StudioError: "not_found".
        """
        found = self.store.jobs.get(name)
        if found is None:
            raise not_found("job", name, "GET /v1/jobs lists them")
        return found

    def running(self) -> Job | None:
        """The job that is being done now."""
        return next((job for job in self.jobs() if job.state == "running"), None)

    def submit(self, kind: Kind, payload: dict[str, Any]) -> Job:
        """Put a job in the queue.

        Raises:
            StudioError: "queue_full".
        """
        with self._changed:
            waiting = sum(job.state in ("queued", "paused") for job in self.jobs())
            if waiting >= self._most:
                raise StudioError(
                    429,
                    "queue_full",
                    f"{waiting} jobs wait already, at most {self._most} may; cancel some or try again later",
                )
            job = self.store.new(kind, payload)
            self._changed.notify_all()
        return job

    def cancel(self, name: str) -> Job:
        """Take a job out of the queue, or end it: a batch in the middle is taken back, bit for bit.

        Raises:
            StudioError: "not_found", "job_finished", or "not_cancellable".
        """
        job = self._unfinished(name)
        with self._changed:
            if not job.can_be_cancelled:
                raise StudioError(
                    409,
                    "not_cancellable",
                    f"job {name!r} ({job.kind}) is at work and would leave the run half done; wait for it",
                )
            if job.state == "running":
                job.wish = "cancel"
                job.changed()
            else:
                self._end(job, "cancelled")
        return job

    def pause(self, name: str) -> Job:
        """Stop a job between two batches; others go on meanwhile.

        Raises:
            StudioError: "not_found", or "job_finished".
        """
        job = self._unfinished(name)
        with self._changed:
            if job.state == "running":
                job.wish = job.wish or "pause"
                job.changed()
            elif job.state == "queued":
                self._set(job, "paused")
        return job

    def resume(self, name: str) -> Job:
        """Put a paused job back into the queue.

        Raises:
            StudioError: "not_found", or "job_finished".
        """
        job = self._unfinished(name)
        with self._changed:
            if job.wish == "pause":
                job.wish = None
            if job.state == "paused":
                self._set(job, "queued")
            self._changed.notify_all()
        return job

    def _unfinished(self, name: str) -> Job:
        job = self.job(name)
        if job.state in FINISHED:
            raise StudioError(
                409,
                "job_finished",
                f"job {name!r} is {job.state} already; what it wrote is taken back with undo",
            )
        return job

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._closing and self._next() is None:
                    self._changed.wait()
                job = self._next()
                if self._closing or job is None:
                    return
                job.started = job.started or now()
                self._set(job, "running")
            self._do(job)

    def _next(self) -> Job | None:
        return next((job for job in self.jobs() if job.state == "queued"), None)

    def _do(self, job: Job) -> None:
        try:
            job.result = self._perform(job)
            self._end(job, "done")
        except Cancelled:
            self._end(job, "cancelled")
        except Paused:
            self._set(job, "paused")
        except Stopped:
            self._set(job, "queued")
        except NmkeError as error:
            self._fail(job, status_and_code(error)[1], str(error))
        except Exception as error:  # the thread must live on; the job says what happened
            logger.exception("job %s failed", job.id)
            self._fail(job, "unexpected", f"unexpected {type(error).__name__}: {error}; the log has more")

    def _fail(self, job: Job, code: str, message: str) -> None:
        job.error = {"code": code, "message": message}
        self._end(job, "failed")

    def _end(self, job: Job, state: Any) -> None:
        job.finished = now()
        self._set(job, state)

    def _set(self, job: Job, state: Any) -> None:
        job.wish = None
        job.tasks.clear()
        job.state = state  # last: who sees it may look at the rest
        self.store.save(job)
