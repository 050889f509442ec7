"""Cells that belong together: one method on one data set at one batch size, over its seeds."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from nmke.bench.plan import CUT_UP
from nmke.bench.record import CellRecord, Checkpoint, Time
from nmke.evaluation.protocols import PROTOCOLS

# Of a protocol's own metrics, fact by fact: what is won in one by losing in another cancels here.
MEAN = "mean"


@dataclass(frozen=True)
class Group:
    """The cells of one method that differ by their seed only.

    Args:
        cells: By ascending seed, at least one.
    """

    cells: tuple[CellRecord, ...]

    @property
    def label(self) -> str:
        """The method as the plan names it."""
        return self.cells[0].identity.label

    @property
    def dataset(self) -> str:
        """Name of the data set."""
        return self.cells[0].identity.stream.dataset

    @property
    def batch_size(self) -> int:
        """Edits solved together."""
        return self.cells[0].identity.batch_size

    @property
    def model(self) -> str:
        """Name of the model."""
        return self.cells[0].identity.model.name

    @property
    def seeds(self) -> tuple[int, ...]:
        """Of its cells."""
        return tuple(cell.identity.seed for cell in self.cells)

    @property
    def status(self) -> str:
        """The cells' status; with how many of each when they differ."""
        found = [cell.status for cell in self.cells]
        kinds = sorted(set(found))
        return kinds[0] if len(kinds) == 1 else ", ".join(f"{found.count(kind)} {kind}" for kind in kinds)

    @property
    def marks(self) -> list[int]:
        """Numbers of edits at which every cell has a checkpoint, ascending."""
        held = [{point.n_edits for point in cell.checkpoints} for cell in self.cells]
        return sorted(set.intersection(*held))

    def points(self, n_edits: int) -> list[Checkpoint]:
        """The checkpoint of every cell at so many edits."""
        return [point for cell in self.cells if (point := cell.at(n_edits)) is not None]

    def facts(self, n_edits: int, time: Time, protocol: str, metric: str) -> dict[str, float]:
        """Value of every fact by id, the mean over the seeds that edited it; facts without a value left out.

        Args:
            n_edits: After how many edits.
            time: Right after each fact's batch, or after the last edit.
            protocol: Name of the protocol.
            metric: One of its metrics, or `MEAN` for the mean of all, of the facts that have all.
        """
        if metric == MEAN:
            each = [self.facts(n_edits, time, protocol, name) for name in PROTOCOLS[protocol].metrics]
            whole = [fact for fact in each[0] if all(fact in values for values in each)]
            return {fact: statistics.fmean(values[fact] for values in each) for fact in whole}
        found: dict[str, list[float]] = {}
        for cell in self.cells:
            point = cell.at(n_edits)
            scores = None if point is None else point.scores(time).get(protocol)
            score = None if scores is None else scores.metrics.get(metric)
            if score is None or score.per_fact is None:
                continue
            for name, value in zip(cell.identity.stream.ids, score.per_fact, strict=False):
                if value is not None:
                    found.setdefault(name, []).append(value)
        return {name: statistics.fmean(values) for name, values in found.items()}


def grouped(cells: Iterable[CellRecord]) -> list[Group]:
    """Groups in the order in which their first cells come."""
    found: dict[tuple[object, ...], list[CellRecord]] = {}
    for cell in cells:
        identity = cell.identity
        stream = {**identity.stream.model_dump(exclude={"ids", "facts_hash"}), "n": len(identity.stream.ids)}
        settings = {name: value for name, value in identity.settings.items() if name not in ("seed", *CUT_UP)}
        model = identity.model.fingerprint
        key = (identity.label, identity.batch_size, model, repr(stream), repr(settings))
        found.setdefault(key, []).append(cell)
    return [Group(tuple(sorted(held, key=lambda cell: cell.identity.seed))) for held in found.values()]


def named_seeds(seeds: Sequence[int]) -> str:
    """As "seed 0" or "seeds 0, 1"."""
    return f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"


def mean_of(values: Sequence[float | None]) -> float | None:
    """Mean of the values, None when one is missing."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known and len(known) == len(values) else None
