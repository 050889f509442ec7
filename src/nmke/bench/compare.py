"""Is one method better than another? The difference over the same facts, with its 95 % interval.

Both edited the same facts in the same order, so facts are compared pair by pair: what makes a fact hard is then the
same on both sides, and the interval of the difference is much narrower than those of the two means. With several
seeds a fact's values are averaged first, since runs of one fact are not independent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from nmke.bench.groups import MEAN, Group, grouped
from nmke.bench.record import CellRecord, Time
from nmke.errors import ConfigError, RequestError, unknown_name
from nmke.evaluation.metrics import Estimate, mean_interval, paired_difference


@dataclass(frozen=True)
class Difference:
    """One metric of two methods over the same facts.

    Args:
        protocol: Name of the protocol.
        metric: Name of the metric, or `MEAN` for the mean of the protocol's metrics.
        a, b: Mean of each with its own interval.
        difference: Mean of a - b over facts, with its paired interval.
        better, worse, equal: How many facts a does better, worse and equally well at than b.
    """

    protocol: str
    metric: str
    a: Estimate
    b: Estimate
    difference: Estimate
    better: int
    worse: int
    equal: int

    @property
    def verdict(self) -> str:
        """Which is higher, if the interval of the difference leaves 0 out."""
        if self.difference.low > 0:
            return "A higher"
        return "B higher" if self.difference.high < 0 else "no difference shown"

    def to_json(self) -> dict[str, Any]:
        """Its fields and the verdict."""
        return {**asdict(self), "verdict": self.verdict}


@dataclass(frozen=True)
class Comparison:
    """Two methods on one data set after some edits.

    Args:
        a, b: What is compared.
        n_edits: After how many edits.
        time: Right after each fact's batch, or after the last edit.
        differences: One per metric that both have, and one for each protocol's mean.
    """

    a: Group
    b: Group
    n_edits: int
    time: Time
    differences: tuple[Difference, ...]

    def to_json(self) -> dict[str, Any]:
        """What `nmke bench --compare --json` prints of it."""
        return {
            "a": self.a.label,
            "b": self.b.label,
            "dataset": self.a.dataset,
            "batch_sizes": [self.a.batch_size, self.b.batch_size],
            "seeds": list(self.a.seeds),
            "n_edits": self.n_edits,
            "time": self.time,
            "differences": [difference.to_json() for difference in self.differences],
        }


def compare(
    cells: Sequence[CellRecord], a: str, b: str, *, at: int | None = None, time: Time = "after_last"
) -> list[Comparison]:
    """Method `a` against method `b`, once for every data set and batch size that both ran on.

    Args:
        cells: Of a benchmark.
        a: Label of one, as in the plan.
        b: Label of the other.
        at: After how many edits; None: the last checkpoint that both have.
        time: Which of the two times.

    Raises:
        ConfigError: If a label is unknown, or there is no such checkpoint.
        RequestError: If the two never edited the same facts.
    """
    groups = grouped(cells)
    known = sorted({group.label for group in groups})
    for label in (a, b):
        if label not in known:
            raise ConfigError(unknown_name("method of this benchmark", label, known))
    pairs = _pairs([g for g in groups if g.label == a], [g for g in groups if g.label == b])
    if not pairs:
        raise RequestError(
            f"{a!r} and {b!r} did not edit the same facts with the same seed at the same batch size; "
            "run both in one plan"
        )
    return [_compare(one, other, at, time) for one, other in pairs]


def _pairs(first: Sequence[Group], second: Sequence[Group]) -> list[tuple[Group, Group]]:
    """Groups on the same streams, of the same batch size where there are such; each with the seeds that both have."""
    same = [pair for x in first for y in second if (pair := _on_shared_streams(x, y)) is not None]
    equal = [(x, y) for x, y in same if x.batch_size == y.batch_size]
    return equal or same


def _on_shared_streams(x: Group, y: Group) -> tuple[Group, Group] | None:
    shared = {_stream(cell) for cell in x.cells} & {_stream(cell) for cell in y.cells}
    if not shared:
        return None
    one, other = (Group(tuple(cell for cell in group.cells if _stream(cell) in shared)) for group in (x, y))
    return one, other


def _stream(cell: CellRecord) -> tuple[int, str, str]:
    return cell.identity.seed, cell.identity.stream.facts_hash, cell.identity.model.fingerprint


def _compare(a: Group, b: Group, at: int | None, time: Time) -> Comparison:
    shared = sorted(set(a.marks) & set(b.marks))
    if not shared or (at is not None and at not in shared):
        held = ", ".join(map(str, shared)) or "none"
        raise ConfigError(
            f"{a.label!r} and {b.label!r} on {a.dataset!r}: checkpoint {at or 'any'} asked, they share {held}; "
            "finish the cells with `nmke bench run`, or choose another with --at"
        )
    n_edits = at or shared[-1]
    scores = a.points(n_edits)[0].scores(time)
    asked = [(protocol, name) for protocol, found in scores.items() for name in (*found.metrics, MEAN)]
    differences = [_difference(a, b, n_edits, time, *one) for one in asked]
    return Comparison(a, b, n_edits, time, tuple(d for d in differences if d is not None))


def _difference(
    a: Group, b: Group, n_edits: int, time: Time, protocol: str, metric: str
) -> Difference | None:
    """Over the facts that have a value on both sides."""
    sides = [group.facts(n_edits, time, protocol, metric) for group in (a, b)]
    shared = [fact for fact in sides[0] if fact in sides[1]]
    if not shared:
        return None
    x, y = ([found[fact] for fact in shared] for found in sides)
    signs = [(p > q) - (p < q) for p, q in zip(x, y, strict=True)]
    return Difference(
        protocol,
        metric,
        mean_interval(x),
        mean_interval(y),
        paired_difference(x, y),
        better=signs.count(1),
        worse=signs.count(-1),
        equal=signs.count(0),
    )
