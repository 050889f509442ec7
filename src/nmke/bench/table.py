"""The table of a benchmark: one row per method, out of the cell records alone."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from nmke.bench.groups import MEAN, Group, grouped, mean_of, named_seeds
from nmke.bench.record import CellRecord, Checkpoint, Time
from nmke.errors import RequestError
from nmke.evaluation.metrics import Estimate, mean_interval
from nmke.health import in_six_places

SHORT = {"reliability": "Rel", "generalization": "Gen", "locality": "Loc"}


@dataclass(frozen=True)
class Row:
    """One method on one data set at one batch size, after some edits; means over seeds.

    Args:
        model, dataset, batch_size, label, seeds, status: Which cells.
        n_edits: After how many edits.
        scores: Mean over facts and its interval, by metric and for the mean of the protocol's metrics; None where it
            cannot be measured.
        perplexity, perplexity_base, kl: On held-out text; None where not finite.
        tasks: Scores of general ability, by task, each after and before the edits.
        drift: Mean over the edited layers of ‖W - W_base‖ / ‖W_base‖.
        neurons_kept: Mean share of neurons that an edit may write; None without masks.
        seconds_per_edit, cpu_seconds_per_edit: Of the edits, without measuring.
        load_average: Lowest and highest load while it was measured.
        peak_memory_mb: Largest.
        content_hash: Of the edited model, of the first seed.
    """

    model: str
    dataset: str
    batch_size: int
    label: str
    seeds: tuple[int, ...]
    status: str
    n_edits: int
    scores: dict[str, Estimate | None]
    perplexity: float | None
    perplexity_base: float
    kl: float | None
    tasks: dict[str, tuple[float, float | None]]
    drift: float | None
    neurons_kept: float | None
    seconds_per_edit: float | None
    cpu_seconds_per_edit: float | None
    load_average: tuple[float, float]
    peak_memory_mb: float
    content_hash: str

    def to_json(self) -> dict[str, Any]:
        """Its fields."""
        return asdict(self)


@dataclass(frozen=True)
class Table:
    """Rows of one protocol at one time.

    Args:
        protocol: Name and version of the protocol.
        time: Right after each fact's batch, or after the last edit.
        metrics: Names of the columns of scores.
        rows: Data set by data set, batch size by batch size, highest mean of the metrics first. Where methods ran with
            other seeds, there are rows for each set of seeds, of all methods that ran with these.
        missing: Cells without the checkpoint, and why, one sentence each.
    """

    protocol: str
    time: Time
    metrics: tuple[str, ...]
    rows: tuple[Row, ...]
    missing: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """What `nmke bench table --json` prints."""
        return {
            "protocol": self.protocol,
            "time": self.time,
            "rows": [row.to_json() for row in self.rows],
            "missing": list(self.missing),
        }

    def blocks(self) -> list[tuple[str, list[Row]]]:
        """Rows that can be compared with one another, under a heading."""
        found: dict[str, list[Row]] = {}
        for row in self.rows:
            size = f"batches of {row.batch_size}" if row.batch_size > 1 else "one at a time"
            heading = f"{row.dataset}, {row.model}, {row.n_edits} edits, {size}, {named_seeds(row.seeds)}"
            found.setdefault(heading, []).append(row)
        return list(found.items())


def make_table(
    cells: Iterable[CellRecord],
    *,
    protocol: str = "teacher_forced",
    time: Time = "after_last",
    at: int | None = None,
) -> Table:
    """The table of these cells.

    Args:
        cells: Of a benchmark.
        protocol: Name of the protocol.
        time: Which of the two times.
        at: After how many edits; None: the last checkpoint of each.

    Raises:
        RequestError: If no cell was scored under that protocol at that checkpoint.
    """
    rows: list[Row] = []
    missing: list[str] = []
    version, metrics = "", tuple[str, ...]()
    for group in _on_equal_seeds(grouped(cells)):
        marks = group.marks
        n_edits = (marks[-1] if marks else None) if at is None else at if at in marks else None
        found = None if n_edits is None else group.points(n_edits)[0].scores(time).get(protocol)
        if n_edits is None or found is None:
            missing.append(_why_missing(group, at, protocol))
            continue
        version, metrics = found.version, (*found.metrics, MEAN)
        rows.append(_row(group, n_edits, time, protocol, metrics))
    if not rows:
        raise RequestError(
            f"nothing to show: {'; '.join(missing) or 'no cell'}; run more with `nmke bench run`"
        )
    rows.sort(key=lambda row: (row.model, row.dataset, row.n_edits, row.batch_size, row.seeds, -_rank(row)))
    if not any(row.scores.get(MEAN) for row in rows):
        metrics = metrics[:-1]
    return Table(version, time, metrics, tuple(rows), tuple(missing))


def _on_equal_seeds(groups: Sequence[Group]) -> Iterator[Group]:
    """For every set of seeds that some method ran with, the methods that ran with these, cut to their cells."""
    streams: dict[tuple[object, ...], list[Group]] = {}
    for group in groups:
        streams.setdefault((group.model, group.dataset, group.batch_size), []).append(group)
    for rivals in streams.values():
        for seeds in sorted({group.seeds for group in rivals}):
            for group in rivals:
                if set(seeds) <= set(group.seeds):
                    yield Group(tuple(cell for cell in group.cells if cell.identity.seed in seeds))


def _row(group: Group, n_edits: int, time: Time, protocol: str, metrics: Sequence[str]) -> Row:
    points = group.points(n_edits)
    scores = {name: _estimate(group, n_edits, time, protocol, name) for name in metrics}
    drifts = [statistics.fmean(point.drift.values()) if point.drift else None for point in points]
    costs = [point.cost for point in points]
    loads = [load for cost in costs for load in cost.load_average]
    return Row(
        model=group.model,
        dataset=group.dataset,
        batch_size=group.batch_size,
        label=group.label,
        seeds=group.seeds,
        status=group.status,
        n_edits=n_edits,
        scores=scores,
        perplexity=mean_of([point.held_out.perplexity for point in points]),
        perplexity_base=statistics.fmean(point.held_out.perplexity_base for point in points),
        kl=mean_of([point.held_out.kl for point in points]),
        tasks={name: _task(points, name) for name in points[0].tasks if all(name in p.tasks for p in points)},
        drift=mean_of(drifts),
        neurons_kept=mean_of([point.neurons_kept for point in points]),
        seconds_per_edit=mean_of([cost.seconds_per_edit for cost in costs]),
        cpu_seconds_per_edit=mean_of([cost.cpu_seconds_per_edit for cost in costs]),
        load_average=(min(loads), max(loads)),
        peak_memory_mb=max(cost.peak_memory_mb for cost in costs),
        content_hash=points[0].content_hash,
    )


def _rank(row: Row) -> float:
    found = row.scores.get(MEAN)
    return -1.0 if found is None else found.mean


def _task(points: Sequence[Checkpoint], name: str) -> tuple[float, float | None]:
    """Mean over seeds of a task's score, after and before."""
    found = [point.tasks[name] for point in points]
    return statistics.fmean(score.value for score in found), mean_of([score.base for score in found])


def _estimate(group: Group, n_edits: int, time: Time, protocol: str, metric: str) -> Estimate | None:
    """Mean over facts; for a score that facts do not have, the mean over seeds, with the interval of one."""
    facts = group.facts(n_edits, time, protocol, metric)
    if facts:
        return mean_interval(list(facts.values()))
    found = [point.scores(time)[protocol].metrics.get(metric) for point in group.points(n_edits)]
    known = [score for score in found if score is not None]
    if len(known) != len(found) or not known:
        return None
    value, low, high = (statistics.fmean(getattr(s, end) for s in known) for end in ("value", "low", "high"))
    return Estimate(value, low, high, known[0].n)


def _why_missing(group: Group, at: int | None, protocol: str) -> str:
    where = f"{group.label} ({group.dataset}, batch {group.batch_size})"
    reasons = [cell.reason for cell in group.cells if cell.reason]
    if reasons:
        return f"{where}: {group.status}, {reasons[0]}"
    asked = "no checkpoint yet" if at is None else f"no checkpoint at {at} edits"
    return (
        f"{where}: {group.status}, {asked if at is not None or not group.marks else f'no {protocol} scores'}"
    )


def markdown(table: Table) -> str:
    """The table as Markdown, one per block, with what the numbers are above each."""
    when = "after the last edit" if table.time == "after_last" else "right after each fact's batch"
    parts = []
    for heading, rows in table.blocks():
        said = (
            f"**{heading}**; {table.protocol}, {when}; mean and 95 % interval over facts; "
            f"perplexity {rows[0].perplexity_base:.2f} before any edit."
        )
        tasks = list(dict.fromkeys(name for row in rows for name in row.tasks))
        names = ["method", *(SHORT.get(metric, metric) for metric in table.metrics), *tasks, *COLUMNS]
        lines = [_line(names), _line(["---"] + ["---:"] * (len(names) - 1))]
        for row in rows:
            scores = score_cells(row, table.metrics)
            lines.append(_line([f"`{row.label}`", *scores, *task_cells(row, tasks), *number_cells(row)]))
        parts.append("\n".join([said, "", *lines]))
    parts += [f"Not in the table: {'; '.join(table.missing)}."] if table.missing else []
    return "\n\n".join(parts) + "\n"


COLUMNS = ("perplexity", "KL", "drift", "neurons", "s/edit", "CPU s/edit", "MB", "status")


def score_cells(row: Row, metrics: Sequence[str]) -> list[str]:
    """The scores of a row, as text."""
    found = [row.scores.get(metric) for metric in metrics]
    return ["-" if e is None else f"{e.mean:.3f} [{e.low:.2f}, {e.high:.2f}]" for e in found]


def task_cells(row: Row, tasks: Sequence[str]) -> list[str]:
    """Tasks of a row, as text: the score, and by how much it differs from the unedited model's."""
    cells = []
    for name in tasks:
        after, before = row.tasks.get(name, (None, None))
        change = "" if after is None or before is None else f" ({after - before:+.3f})"
        cells.append(number(after, ".3f") + change)
    return cells


def number_cells(row: Row) -> list[str]:
    """The other numbers of a row, as text, in the order of `COLUMNS`."""
    return [
        in_six_places(row.perplexity),
        number(row.kl, ".3f", "not finite"),
        number(row.drift, ".3f"),
        number(row.neurons_kept, ".0%"),
        number(row.seconds_per_edit, ".2f"),
        number(row.cpu_seconds_per_edit, ".2f"),
        number(row.peak_memory_mb, ".0f"),
        row.status,
    ]


def number(value: float | None, form: str, missing: str = "-") -> str:
    """A number as text."""
    return missing if value is None else format(value, form)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
