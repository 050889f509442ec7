"""Typed scores: per protocol an estimate of each metric with n and interval, and one row per request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nmke.evaluation.metrics import Estimate, mean_interval

Values = Mapping[str, tuple[float, ...]]


@dataclass(frozen=True)
class ProtocolScores:
    """Scores under one protocol.

    Args:
        version: Name and version of the protocol, such as "teacher_forced/1".
        metrics: Estimate of each metric; None where no request has such a prompt.
        n: How many requests were scored.
        counts: How many prompts went into each metric, and how many requests were left out.
        settings: Numbers that belong to the protocol, such as the generation budget.
    """

    version: str
    metrics: Mapping[str, Estimate | None]
    n: int
    counts: Mapping[str, int]
    settings: Mapping[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The scores as in `--json`: means beside `version`, `n`, `intervals` and `counts`."""
        known = {name: estimate for name, estimate in self.metrics.items() if estimate is not None}
        return {
            "version": self.version,
            **{name: estimate and estimate.mean for name, estimate in self.metrics.items()},
            "n": self.n,
            "intervals": {name: [estimate.low, estimate.high] for name, estimate in known.items()},
            "counts": dict(self.counts),
            **({"settings": dict(self.settings)} if self.settings else {}),
        }


@dataclass(frozen=True)
class RequestScores:
    """What one request scored.

    Args:
        id: The request's id.
        values: Per protocol and metric, one value per prompt; metrics that a request lacks are left out.
        answer: The generated answer to the prompt, when the generation protocol ran.
    """

    id: str
    values: Mapping[str, Values]
    answer: str | None = None

    def mean(self, protocol: str, metric: str) -> float | None:
        """Mean over the request's prompts, None without one."""
        return _mean(self.values.get(protocol, {}).get(metric, ()))

    def to_json(self) -> dict[str, Any]:
        """Id, per protocol the mean of each metric, and the answer if there is one."""
        means = {
            protocol: {metric: _mean(values) for metric, values in metrics.items()}
            for protocol, metrics in self.values.items()
        }
        return {"id": self.id, **means, **({} if self.answer is None else {"answer": self.answer})}


@dataclass(frozen=True)
class ScoreTable:
    """Scores of one model on one list of requests, under one or more protocols."""

    protocols: Mapping[str, ProtocolScores]
    rows: tuple[RequestScores, ...]

    def to_json(self) -> dict[str, Any]:
        """The aggregates, keyed by protocol."""
        return {name: scores.to_json() for name, scores in self.protocols.items()}

    def rows_to_json(self) -> list[dict[str, Any]]:
        """One object per request, in the requests' order."""
        return [row.to_json() for row in self.rows]


def summarise(
    values: Sequence[Values], metrics: Sequence[str], seed: int = 0
) -> tuple[dict[str, Estimate | None], dict[str, int]]:
    """Estimates and prompt counts from each request's values.

    A request's value is the mean over its prompts, and the requests are what is averaged and resampled:
    prompts of one request are not independent.
    """
    estimates: dict[str, Estimate | None] = {}
    for metric in metrics:
        means = [mean for row in values if (mean := _mean(row.get(metric, ()))) is not None]
        estimates[metric] = mean_interval(means, seed) if means else None
    return estimates, {metric: sum(len(row.get(metric, ())) for row in values) for metric in metrics}


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
