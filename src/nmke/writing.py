"""One batch from requests to a row in the ledger: ask, compute, write, look at the result, save."""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from typing import Any

from nmke import batches
from nmke.active_edits import Place
from nmke.batches import BatchReport
from nmke.config import EditConfig
from nmke.editors import methods
from nmke.editors.known_targets import KnownTargets
from nmke.editors.method import INPUT_STATISTICS, STATISTICS, Batch
from nmke.editors.pipeline import compute_updates
from nmke.editors.targets import optimise_targets
from nmke.environment import deterministic, environment
from nmke.errors import HealthError
from nmke.evaluation.target_scores import TargetScore, predictions
from nmke.events import EditRecord
from nmke.health import MOST_ASKED, HealthCheck, HealthReport
from nmke.journal import Journal
from nmke.memory_plan import smaller_plan
from nmke.models.load import EditableModel
from nmke.progress import Progress
from nmke.provenance import active_facts, facts_digest
from nmke.run_memory import RunMemory
from nmke.run_stats import RunStats
from nmke.stats.store import StatsStore
from nmke.types import EditRequest

logger = logging.getLogger(__name__)


class BatchWriter:
    """Writes batches to a run.

    Args:
        model: The session's model.
        journal: The run, open for writing whenever `write` is called.
        store: Cache of key statistics.
    """

    def __init__(self, model: EditableModel, journal: Journal, store: StatsStore) -> None:
        self._model, self._journal = model, journal
        self.known: KnownTargets | None = None  # see `EditSession.share_targets`
        self._folder, self._ledger, self._weights = journal.folder, journal.ledger, journal.weights
        self._memory = RunMemory(self._folder, self._ledger, model.device)
        self._stats = RunStats(model, self._weights.base, store)
        self._health = HealthCheck(model, self._weights.base)

    def write(self, requests: Sequence[EditRequest], config: EditConfig, progress: Progress) -> BatchReport:
        """Edit the requests together; see `EditSession.edit_batch`. Health is looked at, its limits are not."""
        with deterministic(self._model.device):
            return self._write(requests, config, progress)

    def _write(self, requests: Sequence[EditRequest], config: EditConfig, progress: Progress) -> BatchReport:
        batches.check_batch(requests, config)
        batches.check_recalled(config.method, self._weights.side.recalled)
        entry = methods.entry(config.method)
        made = self._made_from(requests)
        hash_before = self._journal.checked_hash()
        before = self._ask(requests)
        todo = [r for r, score in zip(requests, before, strict=True) if score.accuracy < 1.0]
        if not todo:
            known = batches.known_records(requests)
            return BatchReport(self._journal.save("edit", batches.body(config) | made, hash_before, known))
        superseded, turn = self._superseded(todo), self._ledger.edits.count()
        statistics = self._stats.of(config, progress) if STATISTICS in entry.needs else {}
        inputs = self._stats.inputs(config, progress) if INPUT_STATISTICS in entry.needs else {}
        anchors = self._stats.anchors(config, self._folder.contexts, progress)
        with self._weights.side.off(), smaller_plan(len(todo), config):
            batch = Batch(
                self._model,
                todo,
                self._folder.contexts,
                config,
                progress,
                side=self._weights.side.memories.get(config.method),
                stats=statistics,
                inputs=inputs,
                turn=turn,
                state=self._memory.without(list(superseded.values())),
                anchors=anchors,
                held=self._held(todo) if config.hold_earlier else (),
                find_targets=self.known if self.known is not None and turn == 0 else optimise_targets,
            )
            result = compute_updates(entry.value, batch)
        overwritten = self._weights.apply(result.updates, result.side)
        with self._journal.all_or_nothing(lambda: self._weights.take_back(overwritten)):
            after = dict(zip([r.id for r in todo], self._ask(todo), strict=True))
            found = batches.records(requests, before, after, result, superseded)
            drift = self._weights.drift()
            health = self._look_at_health(found, config, drift, turn)
            body = batches.body(config, result, drift=drift, superseded=superseded, health=health) | made
            if statistics:
                body["statistics"] = {str(layer): one.sha256 for layer, one in statistics.items()}
            event = self._journal.save("edit", body, hash_before, found, (result, overwritten))
        masks = {layer: mask.detail for layer, mask in result.masks.items()}
        return BatchReport(event, result.seconds, masks, health)

    def act_on_health(self, report: BatchReport, config: EditConfig) -> None:
        """Do as `config.on_collapse` says about a batch that has just been written.

        Raises:
            HealthError: If it crossed a stop limit; it was taken back before if so asked.
        """
        health = report.health
        if health is None or health.status == "ok":
            return
        name, reasons = report.event.id, "; ".join(health.reasons)
        if health.status == "warn" or config.on_collapse == "continue":
            logger.warning("batch %s: %s", name, reasons)
            return
        if config.on_collapse == "rollback":
            self._journal.take_back([report.event.seq], "undo", {"rolled_back": list(health.reasons)})
            raise HealthError(
                f"batch {name} was taken back, bit for bit: {reasons}; edit fewer facts at once, or lower `clamp`"
            )
        raise HealthError(
            f"batch {name} is saved, but the model's health crossed a limit: {reasons}; take it back with "
            "`nmke undo`, or go on with on_collapse 'continue'"
        )

    def _made_from(self, requests: Sequence[EditRequest]) -> dict[str, Any]:
        """What else decides the batch's bits, for `nmke reproduce`."""
        facts = facts_digest(active_facts(self._ledger), requests)
        return {"facts_sha256": facts, "environment": environment(self._model.device)}

    def _ask(self, requests: Sequence[EditRequest]) -> list[TargetScore]:
        return predictions(self._model, [(r.text, r.target_new) for r in requests])

    def _superseded(self, requests: Sequence[EditRequest]) -> dict[str, Place]:
        """The earlier edit of the same fact, by the id of the new one."""
        index = self._ledger.edits
        holders = ((r.id, index.holder(r.fact_key)) for r in requests)
        return {name: place for name, place in holders if place is not None}

    def _held(self, requests: Sequence[EditRequest]) -> list[EditRequest]:
        """What the model says of the requests' subjects, without what they supersede."""
        index, asked = self._ledger.edits, {request.fact_key for request in requests}
        subjects = dict.fromkeys(request.subject_key for request in requests)
        places = [place for subject in subjects for place in index.about(subject) if place.fact not in asked]
        return [self._ledger.request(place.seq, place.position) for place in places]

    def _look_at_health(
        self, records: Sequence[EditRecord], config: EditConfig, drift: dict[int, float], turn: int
    ) -> HealthReport | None:
        if config.health_every == 0 or (turn + 1) % config.health_every:
            return None
        edited = {record.request.fact_key for record in records}
        holders = self._ledger.edits.holders()
        old = sorted(p for p in holders if p.status == "written" and p.fact not in edited)
        chosen = random.Random(config.seed + turn).sample(old, min(MOST_ASKED, len(old)))
        requests = [self._ledger.request(place.seq, place.position) for place in chosen]
        reached = sum(record.status != "failed" for record in records) / len(records)
        return self._health.measure(config, requests, reached, drift)
