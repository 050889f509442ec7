"""Scores of facts, kept fact by fact while a cell runs, and put together at its checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nmke.bench.record import ProtocolRecord, Score
from nmke.evaluation.metrics import Estimate
from nmke.evaluation.protocols import summary
from nmke.evaluation.score_table import RequestScores


def protocol_records(rows: Sequence[RequestScores], protocols: Sequence[str]) -> dict[str, ProtocolRecord]:
    """Scores over these facts, by protocol, with the value of each fact in the order of `rows`.

    Args:
        rows: One per fact, in the stream's order.
        protocols: Names of the protocols that scored them.
    """
    return {name: _record(rows, name) for name in protocols}


def _record(rows: Sequence[RequestScores], protocol: str) -> ProtocolRecord:
    found = summary(protocol, [row.values[protocol] for row in rows])
    metrics = {
        metric: None if estimate is None else _score(estimate, rows, protocol, metric, found.counts)
        for metric, estimate in found.metrics.items()
    }
    return ProtocolRecord(version=found.version, metrics=metrics, settings=dict(found.settings))


def _score(
    estimate: Estimate,
    rows: Sequence[RequestScores],
    protocol: str,
    metric: str,
    counts: Mapping[str, int],
) -> Score:
    own = metric in counts  # the harmonic mean is of means, no fact has one
    return Score(
        value=estimate.mean,
        low=estimate.low,
        high=estimate.high,
        n=estimate.n,
        prompts=counts[metric] if own else None,
        per_fact=tuple(row.mean(protocol, metric) for row in rows) if own else None,
    )


@dataclass(frozen=True)
class BatchNotes:
    """What is measured after one batch and cannot be measured again later.

    Args:
        rows: Scores of the batch's facts, the batch being the newest.
        cpu_seconds: CPU time of editing it; None when the process was killed before it was noted.
        load: 1-minute load average after it.
        peak_memory_mb: Largest memory of the process that edited it, since the cell was begun or resumed.
    """

    rows: tuple[RequestScores, ...]
    cpu_seconds: float | None
    load: float
    peak_memory_mb: float

    def to_json(self) -> dict[str, Any]:
        """Its fields, each row with every prompt's value."""
        rows = [
            {"id": row.id, "values": {p: dict(m) for p, m in row.values.items()}, "answer": row.answer}
            for row in self.rows
        ]
        return {
            "rows": rows,
            "cpu_seconds": self.cpu_seconds,
            "load": self.load,
            "peak_memory_mb": self.peak_memory_mb,
        }

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> BatchNotes:
        """What `to_json` gave."""
        rows = tuple(_row(row) for row in content["rows"])
        return cls(rows, content["cpu_seconds"], content["load"], content["peak_memory_mb"])


def _row(content: dict[str, Any]) -> RequestScores:
    values = {
        protocol: {metric: tuple(found) for metric, found in metrics.items()}
        for protocol, metrics in content["values"].items()
    }
    return RequestScores(content["id"], values, content["answer"])
