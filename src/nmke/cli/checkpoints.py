"""What is measured every so many edits of a run: `nmke edit --eval-every K --eval-tasks ...`."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from nmke.cli.console import Display

if TYPE_CHECKING:
    from nmke.session import BatchReport, EditSession

FILE = "checkpoints.jsonl"
SCHEMA = "nmke.checkpoint/1"


@dataclass
class Checkpoints:
    """Measures when due; one record each, in the run's `checkpoints.jsonl` and in `--json`.

    Args:
        every: Edits between two measurements; 0: never.
        tasks: Names as `nmke eval --tasks` takes them; "edits" scores the newest facts that the run holds.
        limit: Questions, windows of text or facts at most.
        records: What was measured so far by this command.
    """

    every: int = 0
    tasks: tuple[str, ...] = ()
    limit: int = 50
    records: list[dict[str, Any]] = field(default_factory=list)
    _done: int = 0

    @classmethod
    def create(cls, every: int, tasks: str, limit: int) -> Checkpoints:
        """From flags.

        Raises:
            ConfigError: If a task is unknown.
        """
        from nmke.evaluation.tasks import read_tasks

        return cls(every, read_tasks(tasks) if every else (), limit)

    def after(self, session: EditSession, report: BatchReport, shown: Display) -> None:
        """A batch was written: measure if another `every` edits are full."""
        before = self._done
        self._done += len(report.records)
        if not self.every or before // self.every == self._done // self.every:
            return
        found = {name: self._measure(session, name) for name in self.tasks}
        record = {
            "schema": SCHEMA,
            "event": report.event.id,
            "edits_of_command": self._done,
            "edits_of_run": len(session.active_requests()),
            "content_hash": report.event.hash_after,
            "tasks": {name: content for name, (content, _) in found.items()},
        }
        self.records.append(record)
        path = session.folder.root / FILE
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
        shown.line(f"after {self._done} edits  " + "  ".join(words for _, words in found.values()))

    def _measure(self, session: EditSession, name: str) -> tuple[dict[str, Any], str]:
        """One task: its JSON, and a few words."""
        from nmke.cli.scoring import base_outputs
        from nmke.evaluation.portability import score_cases
        from nmke.evaluation.tasks import EDITS, compare
        from nmke.types import EditCase

        requests = session.active_requests()[-self.limit :]
        cases = [EditCase((request,)) for request in requests]
        if name == EDITS:
            table = score_cases(session.model, cases, base_outputs(session, requests))
            metrics = table.protocols["teacher_forced"].metrics
            said = [f"{metric} {e.mean:.2f}" for metric, e in metrics.items() if e is not None]
            return table.to_json(), f"{', '.join(said)} (newest {len(requests)})"
        compared = compare(session, name, cases, limit=self.limit)
        before = compared.before.metrics if compared.before else {}
        said = [
            f"{metric} {e.mean:.3f}" + (f" (unedited {before[metric].mean:.3f})" if metric in before else "")
            for metric, e in compared.after.metrics.items()
        ]
        return compared.to_json(), f"{name} {', '.join(said)}"
