"""Jobs: what writes to the run, one after another, kept on disk so that a restart goes on where it was."""

from __future__ import annotations

import json
import re
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal, get_args

from nmke.damage import load_json, reason
from nmke.errors import LedgerError
from nmke.models.cache import atomic_file

State = Literal["queued", "running", "paused", "done", "failed", "cancelled"]
Kind = Literal["edit", "undo", "revert", "retry", "prepare", "export"]
Wish = Literal["cancel", "pause", "stop"]
FINISHED = ("done", "failed", "cancelled")
MOST_KEPT = 200  # finished jobs
_PROBABILITY = re.compile(r"p = ([0-9.]+)")
_SHOWN = ("id", "kind", "created", "state", "started", "finished", "result", "error")
_SAVED = (*_SHOWN, "seq_before", "own")


class Cancelled(Exception):
    """Raised out of a progress callback: the session takes the batch back, bit for bit."""


class Stopped(Exception):
    """The studio is closing; the job goes on when it is started again."""


class Paused(Exception):
    """The job stopped between two batches, as it was asked to."""


@dataclass
class Job:
    """One job.

    Args:
        id: Its name.
        kind: What it does.
        created: UTC time.
        payload: What exactly was asked; written once.
        state: Where it stands.
        started, finished: UTC times.
        seq_before: Newest event of the ledger when it was last begun, None while it is not at work.
        own: Events of the ledger that it wrote before that.
        result: What it did, as far as it came.
        error: Code and message, when it failed.
        tasks: What is going on now, outermost first.
        curve: Mean probability of the new answers after each optimisation step of the current batch.
        wish: What somebody asked of it meanwhile.
        version: Grows with every change.
    """

    id: str
    kind: Kind
    created: str
    payload: dict[str, Any]
    state: State = "queued"
    started: str | None = None
    finished: str | None = None
    seq_before: int | None = None
    own: list[int] = field(default_factory=list)
    result: dict[str, Any] | None = None
    error: dict[str, str] | None = None
    tasks: list[RunningTask] = field(default_factory=list)
    curve: list[float] = field(default_factory=list)
    wish: Wish | None = None
    version: int = 0

    @property
    def can_be_cancelled(self) -> bool:
        """Whether it may end in the middle: taking edits back may not, the run would be left without later ones."""
        return self.kind not in ("undo", "revert") or self.state != "running"

    def snapshot(self) -> dict[str, Any]:
        """Everything about it that can be shown, without what was asked."""
        tasks = [vars(task) for task in list(self.tasks)]
        return {
            **{name: getattr(self, name) for name in _SHOWN},
            "summary": self.payload.get("summary", ""),
            "wish": self.wish,
            "progress": {"tasks": tasks, "curve": list(self.curve)},
        }

    def changed(self) -> None:
        """Something changed."""
        self.version += 1

    def obey(self) -> None:
        """Raise if it is to end now.

        Raises:
            Cancelled: Or `Stopped`, as asked.
        """
        if self.wish == "cancel" and self.can_be_cancelled:
            raise Cancelled
        if self.wish == "stop":
            raise Stopped


@dataclass
class RunningTask:
    """A task as it is now."""

    title: str
    total: float
    done: float = 0.0
    note: str = ""


@dataclass(frozen=True)
class JobProgress:
    """Shows progress in a job and ends it at the next callback once that is wished."""

    job: Job

    @contextmanager
    def task(self, title: str, total: float) -> Iterator[JobTask]:
        """See `nmke.progress.Progress`."""
        self.job.obey()
        running = RunningTask(title, total)
        self.job.tasks.append(running)
        if title == "target values":
            self.job.curve.clear()
        self.job.changed()
        try:
            yield JobTask(self.job, running)
        finally:
            self.job.tasks.remove(running)
            self.job.changed()


@dataclass(frozen=True)
class JobTask:
    """See `nmke.progress.Task`."""

    job: Job
    running: RunningTask

    def advance(self, steps: float = 1, note: str = "") -> None:
        """Count, and end the job if that is wished."""
        self.running.done += steps
        self.running.note = note or self.running.note
        found = _PROBABILITY.search(note)
        if found and not steps:
            self.job.curve.append(float(found[1]))
        self.job.changed()
        self.job.obey()


class JobStore:
    """The jobs of a run, on disk: one folder each, the payload written once, the state whenever it changes.

    Args:
        folder: Where they are kept; made when missing.

    Raises:
        LedgerError: If a job cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = threading.Lock()
        folder.mkdir(parents=True, exist_ok=True)
        self.jobs = {job.id: job for job in map(_read, sorted(folder.glob("j*/state.json")))}
        self._prune()

    def new(self, kind: Kind, payload: dict[str, Any]) -> Job:
        """A new job, on disk."""
        with self._lock:
            newest = max((int(name[1:]) for name in self.jobs), default=0)
            job = Job(f"j{newest + 1:06d}", kind, now(), payload)
            folder = self.folder / job.id
            folder.mkdir()
            _write(folder / "payload.json", payload)
            self.save(job)
            self.jobs[job.id] = job
        return job

    def save(self, job: Job) -> None:
        """Keep the state as it is now."""
        _write(self.folder / job.id / "state.json", {name: getattr(job, name) for name in _SAVED})
        job.changed()

    def _prune(self) -> None:
        finished = [job.id for job in self.jobs.values() if job.state in FINISHED]
        for name in finished[:-MOST_KEPT]:
            del self.jobs[name]
            shutil.rmtree(self.folder / name, ignore_errors=True)


def now() -> str:
    """UTC time."""
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")


def _read(path: Path) -> Job:
    try:
        saved = load_json(path.read_text(encoding="utf-8"))
        payload = load_json((path.parent / "payload.json").read_text(encoding="utf-8"))
        job = Job(**{name: saved[name] for name in _SAVED}, payload=payload)
        if job.state not in get_args(State) or job.kind not in get_args(Kind):
            raise ValueError(f"state {job.state!r}, kind {job.kind!r}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise LedgerError(
            f"job {str(path.parent)!r} cannot be read ({reason(error)}); move the folder away to forget the job"
        ) from error
    if job.state == "running":  # the process was killed meanwhile
        job.state = "queued"
    return job


def _write(path: Path, content: dict[str, Any]) -> None:
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
