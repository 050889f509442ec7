"""The report of a benchmark: methods beside each other on the same facts, now and over the stream."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from nmke.bench.record import CellRecord, Checkpoint, Score
from nmke.viz.figures import Axis, Figure, Series, Value, share
from nmke.viz.report import Cell, Report, Section, Table
from nmke.viz.scales import counted, label

PROTOCOL = "teacher_forced"
METRICS = ("reliability", "generalization", "locality")
MOST_CURVES = 6
FIRST = ("nmke", "alphaedit")  # drawn whenever there are more methods than curves

Group = list[CellRecord]
Measure = Callable[[Checkpoint], Value]


def bench_report(folder: Path, cells: Sequence[CellRecord], *, made: str) -> Report:
    """The report of the cells of a benchmark, a section for each model, data set and batch size."""
    groups: dict[tuple[str, str, int], Group] = {}
    for cell in cells:
        identity = cell.identity
        key = identity.model.name, identity.stream.dataset, identity.batch_size
        groups.setdefault(key, []).append(cell)
    several = len(groups) > 1
    sections = [_section(key, groups[key], several=several) for key in sorted(groups)]
    models = sorted({cell.identity.model.name for cell in cells})
    data = sorted({cell.identity.stream.dataset for cell in cells})
    return Report(
        title=f"Benchmark {folder.resolve().name!r}",
        lead=f"{counted(len(cells), 'cell')}: {counted(len(_labels(cells)), 'method')} on {', '.join(models)}; "
        f"facts of {', '.join(data)}.",
        notice="",
        tiles=_tiles(cells),
        sections=(*sections, _about(folder, cells)),
        made=made,
        about={"cells": [cell.model_dump(mode="json", by_alias=True) for cell in cells]},
    )


def _tiles(cells: Sequence[CellRecord]) -> tuple[tuple[str, str, str], ...]:
    count = {
        status: sum(cell.status == status for cell in cells)
        for status in ("done", "collapsed", "failed", "running")
    }
    edits = max((cell.last.n_edits for cell in cells if cell.last), default=0)
    seeds = sorted({cell.identity.seed for cell in cells})
    unfinished = [f"{n} {status}" for status, n in count.items() if status != "done" and n]
    return (
        ("cells done", f"{count['done']} of {len(cells)}", ", ".join(unfinished)),
        ("methods", str(len(_labels(cells))), ""),
        ("longest stream", counted(edits, "edit"), ""),
        ("seeds", str(len(seeds)), ", ".join(map(str, seeds))),
    )


def _section(key: tuple[str, str, int], cells: Group, *, several: bool) -> Section:
    model, dataset, batch = key
    name = f"{model}, {dataset}, batches of {batch}"
    prefix = f"{model}-{dataset}-{batch}-" if several else ""
    cells = sorted(cells, key=lambda cell: (cell.identity.label, cell.identity.seed))
    figures = [_now(cells, metric, prefix) for metric in METRICS]
    figures += [_curve(cells, f"{prefix}over-{m}", m, _share_axis(), _metric(m), _ends(m)) for m in METRICS]
    figures += [_curve(cells, prefix + id_, title, axis, of) for id_, title, axis, of in CURVES]
    text = (
        f"Protocol {PROTOCOL}/1; scored after the last edit of the stream unless it says otherwise. Locality is "
        "agreement with the unedited model. A number without its interval is no result.",
    )
    kept = tuple(figure for figure in figures if figure is not None)
    return Section(f"part-{prefix or 'all'}".rstrip("-"), name, text, (_table(cells, prefix),), kept)


def _table(cells: Group, prefix: str) -> Table:
    rows: list[tuple[Cell | str, ...]] = []
    for cell in cells:
        point = cell.last
        state = Cell(cell.status, "good" if cell.status == "done" else "bad")
        named = (Cell(cell.identity.label, "code"), Cell(str(cell.identity.seed), "number"), state)
        if point is None:
            rows.append((*named, *(Cell("") for _ in range(9))))
            continue
        held, cost = point.held_out, point.cost
        worst = max(point.drift.values(), default=0.0)
        rows.append(
            (
                *named,
                Cell(str(point.n_edits), "number"),
                *(Cell(_interval(_score(point, metric)), "number") for metric in METRICS),
                Cell(f"{label(held.perplexity_base)} → {_number(held.perplexity)}", "number"),
                Cell(_number(held.kl), "number"),
                Cell(f"{worst:.1%}", "number"),
                Cell(_number(cost.seconds_per_edit), "number"),
                Cell(f"{cost.peak_memory_mb:.0f}", "number"),
            )
        )
    columns = (
        "method", "seed", "state", "edits", *METRICS, "perplexity", "KL (nats)", "largest drift", "s per edit",
        "peak MB",
    )  # fmt: skip
    note = (
        f"Means with 95 % bootstrap intervals over facts. Perplexity and KL on {_texts(cells)}. "
        "Drift: ‖ΔW‖/‖W‖ of the layer that moved most."
    )
    return Table(f"{prefix}cells", columns, tuple(rows), note=note)


def _now(cells: Group, metric: str, prefix: str) -> Figure | None:
    """Each method's newest score, right after its batch and after the last edit; one row per method."""
    labels, scored = _labels(cells), [cell for cell in cells if cell.last]
    rows = [
        (cell, _score(cell.last, metric), _score(cell.last, metric, "after_batch"))
        for cell in scored
        if cell.last
    ]
    places = [(_place(labels, cell, cells), now, then) for cell, now, then in rows]
    if not any(now for _, now, _ in places):
        return None
    series = (
        Series(
            "right after its batch",
            tuple(None if then is None else then.value for _, _, then in places),
            tuple(place for place, _, _ in places),
            mark="rings",
            colour=5,
        ),
        Series(
            "after the last edit",
            tuple(None if now is None else now.value for _, now, _ in places),
            tuple(place for place, _, _ in places),
            tuple(None if now is None else now.low for _, now, _ in places),
            tuple(None if now is None else now.high for _, now, _ in places),
            mark="dots",
            colour=0,
        ),
    )
    seeds = len({cell.identity.seed for cell in cells})
    each = f" One mark for each of {seeds} seeds." if seeds > 1 else ""
    edits = sorted({cell.last.n_edits for cell in scored if cell.last})
    span = (
        f"{edits[0]}"
        if len(edits) == 1
        else f"{edits[0]} to {edits[-1]} (streams that are not finished are shorter)"
    )
    return Figure(
        f"{prefix}{metric}",
        metric.capitalize(),
        f"Mean over facts after {span} edits; lines: 95 % bootstrap intervals.{each}",
        share(f"{metric} (mean over facts)"),
        Axis("", categories=tuple(labels)),
        series,
    )


def _curve(
    cells: Group,
    id_: str,
    title: str,
    axis: Axis,
    of: Measure,
    ends: Callable[[Checkpoint], tuple[Value, Value]] | None = None,
) -> Figure | None:
    """One line per method over the number of edits: the mean over seeds."""
    shown = _shown([cell for cell in cells if len(cell.checkpoints) > 1])
    series = []
    for number, name in enumerate(shown):
        own = [cell for cell in cells if cell.identity.label == name]
        marks = sorted({point.n_edits for cell in own for point in cell.checkpoints})
        found = [[point for cell in own if (point := cell.at(mark)) is not None] for mark in marks]
        low, high = zip(*(_envelope(points, ends) for points in found), strict=True) if ends else ((), ())
        line = Series(
            name,
            tuple(float(mark) for mark in marks),
            tuple(_mean([of(point) for point in points]) for points in found),
            low,
            high,
            colour=number,
        )
        series.append(line)
    if not any(value is not None for line in series for value in line.y):
        return None
    left = len(_labels(cells)) - len(shown)
    others = (
        f"The numbers of {counted(left, 'further method')} are in the table and in the CSV files."
        if left > 0
        else ""
    )
    seeds = len({cell.identity.seed for cell in cells})
    bands = "Bands: 95 % intervals" + (
        "; of several seeds from the lowest end to the highest. " if seeds > 1 else ". "
    )
    named = f"{shown[0]}. " if len(shown) == 1 else ""  # several are in the legend
    means = f"Lines: means over {seeds} seeds. " if seeds > 1 else ""
    caption = f"{named}{means}{bands if ends else ''}{others}".strip()
    return Figure(
        id_,
        title[:1].upper() + title[1:] + " over the stream",
        caption,
        Axis("edits", whole=True),
        axis,
        tuple(series),
    )


def _envelope(
    points: Sequence[Checkpoint], ends: Callable[[Checkpoint], tuple[Value, Value]]
) -> tuple[Value, Value]:
    found = [(low, high) for low, high in map(ends, points) if low is not None and high is not None]
    return (min(low for low, _ in found), max(high for _, high in found)) if found else (None, None)


def _shown(cells: Group) -> list[str]:
    """Methods with a curve: all, or the best by mean score, with those that must not be missing."""
    labels = _labels(cells)
    if len(labels) <= MOST_CURVES:
        return labels
    best = {name: max(_overall(cell) for cell in cells if cell.identity.label == name) for name in labels}
    ranked = sorted(labels, key=lambda name: (name not in FIRST, -best[name]))
    return [name for name in labels if name in ranked[:MOST_CURVES]]


def _overall(cell: CellRecord) -> float:
    scores = [_score(cell.last, metric) for metric in METRICS] if cell.last else []
    known = [score.value for score in scores if score is not None]
    return sum(known) / len(known) if known else -1.0


def _labels(cells: Sequence[CellRecord]) -> list[str]:
    return list(dict.fromkeys(cell.identity.label for cell in cells))


def _place(labels: list[str], cell: CellRecord, cells: Group) -> float:
    """The row of a cell; the seeds of one method stand a little apart."""
    seeds = sorted({other.identity.seed for other in cells})
    middle = (len(seeds) - 1) / 2
    return labels.index(cell.identity.label) + 0.6 * (seeds.index(cell.identity.seed) - middle) / max(
        1, len(seeds)
    )


def _score(point: Checkpoint | None, metric: str, time: str = "after_last") -> Score | None:
    if point is None:
        return None
    scores = point.after_last if time == "after_last" else point.after_batch
    return scores[PROTOCOL].metrics.get(metric) if PROTOCOL in scores else None


def _metric(metric: str) -> Measure:
    def of(point: Checkpoint) -> Value:
        score = _score(point, metric)
        return None if score is None else score.value

    return of


def _ends(metric: str) -> Callable[[Checkpoint], tuple[Value, Value]]:
    def ends(point: Checkpoint) -> tuple[Value, Value]:
        score = _score(point, metric)
        return (None, None) if score is None else (score.low, score.high)

    return ends


def _growth(point: Checkpoint) -> Value:
    held = point.held_out
    return None if held.perplexity is None else held.perplexity / held.perplexity_base


def _drift(point: Checkpoint) -> Value:
    return max(point.drift.values(), default=0.0)


CURVES: tuple[tuple[str, str, Axis, Measure], ...] = (
    ("perplexity", "perplexity on held-out text", Axis("perplexity / unedited model's", log=True), _growth),
    ("kl", "KL to the unedited model", Axis("KL (nats per token)"), lambda point: point.held_out.kl),
    (
        "drift",
        "drift of the weights",
        Axis("largest drift of a layer (% of ‖W‖)", low=0.0, percent=True),
        _drift,
    ),
    (
        "seconds",
        "time per edit",
        Axis("seconds per edit", low=0.0),
        lambda point: point.cost.seconds_per_edit,
    ),
    ("memory", "memory", Axis("peak memory (MB)", low=0.0), lambda point: point.cost.peak_memory_mb),
)


def _share_axis() -> Axis:
    return share("mean over facts, after the last edit")


def _mean(values: Sequence[Value]) -> Value:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _interval(score: Score | None) -> str:
    return "" if score is None else f"{score.value:.3f} [{score.low:.3f}, {score.high:.3f}]"


def _number(value: Value) -> str:
    return "not finite" if value is None else label(value)


def _texts(cells: Group) -> str:
    found = {(p.held_out.text, p.held_out.tokens) for cell in cells if (p := cell.last)}
    return "; ".join(f"{text} ({tokens} tokens)" for text, tokens in sorted(found)) or "held-out text"


def _about(folder: Path, cells: Sequence[CellRecord]) -> Section:
    rows = tuple(
        (
            Cell(cell.identity.id, "code"),
            cell.identity.label,
            cell.identity.source,
            ", ".join(f"{k}={v}" for k, v in cell.identity.variant.items()) or "its own defaults",
            f"{cell.identity.stream.dataset} from record {cell.identity.stream.start}, "
            f"{cell.identity.stream.order} order, {counted(len(cell.identity.stream.ids), 'fact')}",
            Cell(cell.identity.stream.facts_hash[:12], "code"),
            Cell(cell.last.content_hash[:12] if cell.last else "", "code"),
            cell.reason or "",
        )
        for cell in cells
    )
    columns = (
        "cell",
        "method",
        "source",
        "settings changed",
        "stream",
        "facts hash",
        "content hash",
        "why it ended",
    )
    machines = sorted(
        {", ".join(f"{k} {v}" for k, v in cell.machine.items() if k != "load_average") for cell in cells}
    )
    versions = sorted({", ".join(f"{k} {v}" for k, v in cell.versions.items()) for cell in cells})
    text = (f"Machine: {'; '.join(machines)}.", f"Versions: {'; '.join(versions)}.")
    commands = (
        f"nmke report {folder} --format json    # every number, with each fact's own",
        f"nmke report {folder} --format csv -o tables",
    )
    tables = (
        Table(
            "identity",
            columns,
            rows,
            f"{counted(len(cells), 'cell')}: what decides their numbers",
            folded=True,
        ),
    )
    return Section("again", "What was run", text, tables, commands=commands)
