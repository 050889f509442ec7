"""What API and pages have in common: one open run, the worker that writes to it, and everyone's turn at the model."""

from __future__ import annotations

import copy
import dataclasses
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from nmke.config import EditConfig
from nmke.errors import ConfigError, RequestError
from nmke.events import EditRecord, Event
from nmke.ledger import Ledger, Row
from nmke.models.chat import Listener, Reply, reply
from nmke.models.generate import Decoding
from nmke.models.tokens import TextEncoder
from nmke.readable import check_editable
from nmke.session import EditSession
from nmke.studio.gate import Gate
from nmke.studio.jobs import Job, JobStore
from nmke.studio.limits import Limits, StudioError, not_found
from nmke.studio.work import perform, request_json
from nmke.studio.worker import Worker
from nmke.types import EditRequest

Which = Literal["edited", "base"]
FOLDER = "studio"


@dataclass(frozen=True)
class Place:
    """An edit in the ledger.

    Args:
        at: Batch and position.
        record: What it is.
        batch: Name of its batch.
        created: UTC time.
        active: Whether its batch is in the model.
    """

    at: Row
    record: EditRecord
    batch: str
    created: str
    active: bool


class Studio:
    """An open run.

    Args:
        session: The run; from here on only the studio's worker writes to it.
        limits: What one request may ask for.

    Raises:
        LedgerError: If another process writes to the run.
    """

    def __init__(self, session: EditSession, limits: Limits | None = None) -> None:
        self.session, self.limits = session, limits or Limits()
        self.gate = Gate(self.limits.waiting_answers)
        self.root = session.folder.root.resolve()
        if session.pending_replay() is None:
            list(session.edit_many([]))  # takes the lock, so that nobody else writes
        self._ledger, self._reading = Ledger(session.folder.ledger), threading.Lock()
        self._head: dict[str, Any] = {}
        # Tokenizers are not made for two threads; this one checks requests while the model's own is at work.
        tokenizer = copy.deepcopy(session.model.tokenizer)
        self._checker = dataclasses.replace(
            session.model, tokenizer=tokenizer, encoder=TextEncoder(tokenizer)
        )
        self._checking = threading.Lock()
        store = JobStore(self.root / FOLDER / "jobs")
        self.worker = Worker(store, lambda job: perform(self, job), self.limits.queued_jobs)
        self.worker.start()

    def close(self) -> None:
        """End the running job at its next callback; it goes on when the run is opened again."""
        self.worker.close()
        self._ledger.close()
        self.session.close()

    # ------------------------------------------------------------------ the model

    def answer(
        self,
        turns: Sequence[dict[str, str]],
        decoding: Decoding,
        which: Which = "edited",
        *,
        raw: bool = False,
        tell: Listener | None = None,
    ) -> Reply:
        """What the edited or the unedited model says, when it is this request's turn.

        Raises:
            StudioError: If the prompt or the answer is too long, or too many wait.
            RequestError: If the model cannot read it.
        """
        self.limits.check_prompt("".join(turn["content"] for turn in turns))
        self.limits.check_tokens(decoding.max_new_tokens)
        with self.gate.turn(), self.session.base() if which == "base" else nullcontext():
            return reply(self.session.model, turns, decoding, raw=raw, tell=tell)

    def check(self, requests: Sequence[EditRequest]) -> None:
        """Refuse facts that the model cannot read.

        Raises:
            RequestError: Names the edit.
            StudioError: If there are too many, or a prompt is too long.
        """
        if len(requests) > self.limits.facts:
            raise StudioError(
                413,
                "too_many_facts",
                f"{len(requests):,} facts were sent, one job takes {self.limits.facts:,}; send them in parts",
            )
        for request in requests:
            self.limits.check_prompt(request.text)
        with self._checking:
            check_editable(self._checker, requests)

    # ------------------------------------------------------------------ the record

    @contextmanager
    def reading(self) -> Iterator[Ledger]:
        """The ledger, for one reader at a time; the worker's own is never waited for."""
        with self._reading:
            yield self._ledger

    def edits(
        self, text: str = "", status: Any = None, limit: int = 100, before: Row | None = None
    ) -> list[Place]:
        """Edits, newest first; see `Ledger.search`."""
        with self.reading() as ledger:
            return self._places(ledger, ledger.search(text, status, limit=limit, before=before))

    def edit(self, name: str) -> Place:
        """The newest edit of that id, an active one before those taken back.

        Raises:
            StudioError: "not_found".
        """
        with self.reading() as ledger:
            found = self._places(ledger, ledger.named(name))
        if not found:
            raise not_found("edit", name, "GET /v1/edits lists them")
        return next((place for place in found if place.active), found[0])

    @staticmethod
    def _places(ledger: Ledger, found: Sequence[tuple[Row, EditRecord]]) -> list[Place]:
        active = set(ledger.active())
        events = {seq: ledger.event(seq) for seq in {at[0] for at, _ in found}}
        return [
            Place(at, record, events[at[0]].id, events[at[0]].created, at[0] in active)
            for at, record in found
        ]

    def batches(self, most: int) -> list[Event]:
        """The newest active batches, oldest first."""
        with self.reading() as ledger:
            return [ledger.event(seq) for seq in ledger.active()[-most:]]

    def head(self) -> dict[str, Any]:
        """Where the run stands."""
        with self.reading() as ledger:
            if self._head.get("seq") != ledger.last_seq():
                last, holders = ledger.last(), [place.status for place in ledger.edits.holders()]
                self._head = {
                    "seq": 0 if last is None else last.seq,
                    "content_hash": self.session.weights.base_hash() if last is None else last.hash_after,
                    "batches": ledger.edits.count(),
                    "edits": holders.count("written"),
                    "failed": holders.count("failed"),
                }
            return self._head

    # ------------------------------------------------------------------ jobs

    def submit_edits(
        self,
        requests: Sequence[EditRequest],
        settings: dict[str, Any] | None = None,
        *,
        resume: bool = False,
        watch: bool = False,
        summary: str = "",
    ) -> Job:
        """Queue facts to edit.

        Args:
            requests: The facts; ids that were derived and are taken get a number.
            settings: Fields of `EditConfig` to change for them.
            resume: Skip facts that the run holds instead of refusing them.
            watch: Ask the first facts' prompts before and after.
            summary: A few words for the list of jobs.

        Raises:
            NmkeError: If a fact or a setting cannot be used.
        """
        if not requests:
            raise RequestError("no fact was sent; send at least one")
        self.check(requests)
        settings = self._checked(settings)
        with self.reading() as ledger:
            taken = [request.id for request in requests if request.id in ledger.edits]
        if taken and not resume:
            raise StudioError(
                409,
                "already_edited",
                f"{len(taken)} of {len(requests)} facts are in the run already (first: {taken[0]!r}); "
                "skip them with resume, or give them other ids",
            )
        first = f"{requests[0].text} → {requests[0].target_new}"
        payload = {
            "requests": [request_json(request) for request in requests],
            "settings": settings,
            "resume": resume,
            "watch": watch,
            "summary": summary or (first if len(requests) == 1 else f"{len(requests)} facts"),
        }
        return self.worker.submit("edit", payload)

    def unused_id(self, request: EditRequest) -> EditRequest:
        """The request, under another id when its own is in the run: asking for a fact anew is no mistake."""
        name, number = request.id, 2
        with self.reading() as ledger:
            while request.id in ledger.edits:
                request = dataclasses.replace(request, id=f"{name}-{number}")
                number += 1
        return request

    def submit_undo(self, batches: int) -> Job:
        """Queue taking back the newest batches.

        Raises:
            StudioError: "nothing_to_undo".
        """
        with self.reading() as ledger:
            held = ledger.edits.count()
        if batches > held and not any(job.state in ("queued", "running") for job in self.worker.jobs()):
            raise StudioError(
                409,
                "nothing_to_undo",
                f"undo of {batches} batches asked, the run holds {held}; ask for fewer",
            )
        return self.worker.submit("undo", {"n": batches, "summary": f"{batches} newest batches"})

    def submit_revert(self, name: str) -> Job:
        """Queue taking back one edit wherever it stands."""
        place = self._active(name)
        return self.worker.submit("revert", {"id": name, "summary": _named(place.record.request)})

    def submit_retry(self, name: str, settings: dict[str, Any] | None = None) -> Job:
        """Queue editing a failed fact again with other settings."""
        place = self._active(name)
        if place.record.status != "failed":
            raise StudioError(
                409,
                "not_failed",
                f"edit {name!r} is {place.record.status!r}; only failed edits can be retried",
            )
        payload = {
            "ids": [name],
            "settings": self._checked(settings),
            "summary": _named(place.record.request),
        }
        return self.worker.submit("retry", payload)

    def submit_prepare(self, settings: dict[str, Any] | None = None) -> Job:
        """Queue gathering the key statistics that settings need."""
        return self.worker.submit(
            "prepare", {"settings": self._checked(settings), "summary": "key statistics"}
        )

    def submit_export(self, form: str, name: str, *, force: bool = False) -> Job:
        """Queue an export into the run folder's `exports/`.

        Raises:
            NmkeError: If the format is unknown, or the name is taken.
        """
        from nmke.export import exporters

        exporters.get(form)
        target = self.export_path(form, name)
        if target.exists() and not force:
            raise StudioError(
                409, "exists", f"export {name!r} exists; replace it with force or choose another"
            )
        payload = {"format": form, "name": name, "force": force, "summary": f"{form}: {name}"}
        return self.worker.submit("export", payload)

    def export_path(self, form: str, name: str) -> Path:
        """Where an export goes; a name is one part of a path, never more."""
        if not name or not all(c.isascii() and (c.isalnum() or c in "._-") for c in name) or name[0] in ".-":
            raise StudioError(
                422, "invalid_name", f"name {name[:80]!r} is not plain; use letters, digits, '.', '_' and '-'"
            )
        if len(name) > 64:
            raise StudioError(
                422, "invalid_name", f"a name of {len(name)} characters was given; use 64 at most"
            )
        return self.root / "exports" / (f"{name}.gguf" if form == "gguf" else name)

    def _active(self, name: str) -> Place:
        place = self.edit(name)
        if not place.active:
            raise StudioError(
                409, "not_active", f"edit {name!r} was taken back already; edit the fact again instead"
            )
        return place

    def _checked(self, settings: dict[str, Any] | None) -> dict[str, Any]:
        """Settings that a request may change: all but where text is read from."""
        given = dict(settings or {})
        if given.get("corpus", self.session.config.corpus) != self.session.config.corpus:
            raise ConfigError(
                f"corpus {str(given['corpus'])[:80]!r} was asked for; a request cannot name files or data sets: "
                "set it when the studio is started"
            )
        config = EditConfig.create(**given)
        return config.model_dump(mode="json", exclude_unset=True)


def _named(request: EditRequest) -> str:
    return f"{request.id}: {request.text} → {request.target_new}"
