"""How `nmke bench` shows tables, comparisons and methods on a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from nmke.cli.console import fact, make_table, note, say, stdout

if TYPE_CHECKING:
    from nmke.bench.compare import Comparison, Difference
    from nmke.bench.table import Row, Table

WHEN = {"after_last": "after the last edit", "after_batch": "right after each fact's own batch"}


def print_table(table: Table) -> None:
    """One table per data set, batch size and set of seeds; interval under each mean, settings under the method."""
    from nmke.bench.groups import MEAN
    from nmke.bench.table import SHORT, number
    from nmke.health import in_six_places

    for heading, rows in table.blocks():
        names = [SHORT.get(metric, metric) for metric in table.metrics]
        right = (*names, "ppl\nKL", "drift", "s per\nedit")
        cells = [
            (
                _name(row),
                *(_estimate(row, metric, interval=metric != MEAN) for metric in table.metrics),
                f"{in_six_places(row.perplexity, 'inf')}\n{number(row.kl, '.3f', 'inf')}",
                number(row.drift, ".3f"),
                number(row.seconds_per_edit, ".1f"),
            )
            for row in rows
        ]
        made = make_table(("method", *right), cells, right=right)
        made.padding = (0, 1, 0, 0)  # so that the longest name fits beside its numbers in 80 columns
        made.title, made.title_justify, made.title_style = heading, "left", "bold"
        stdout().print(made)
        say(f"{table.protocol}, {WHEN[table.time]}; 95 % intervals over facts")
        say(
            f"ppl, KL: perplexity ({rows[0].perplexity_base:.2f} before any edit) and KL in nats on held-out text"
        )
        say()
    for sentence in table.missing:
        note(f"not in the table: {sentence}")


def print_comparisons(found: Sequence[Comparison]) -> None:
    """One table per protocol, data set and batch size."""
    from nmke.bench.groups import named_seeds

    columns = ("metric", "A", "B", "A - B [95 %]", "> = <", "higher")
    for one in found:
        size = f"{one.a.batch_size}" if one.a.batch_size == one.b.batch_size else _sizes(one)
        fact("A", one.a.label)
        fact("B", one.b.label)
        stream = (
            f"{one.a.dataset}, {one.a.model}, {one.n_edits} edits, batch {size}, {named_seeds(one.a.seeds)}"
        )
        fact("on", f"{stream}, {WHEN[one.time]}")
        for protocol in dict.fromkeys(difference.protocol for difference in one.differences):
            rows = [_difference(d) for d in one.differences if d.protocol == protocol]
            made = make_table(columns, rows, right=columns[1:5])
            made.title, made.title_justify, made.title_style = protocol, "left", "bold"
            stdout().print(made)
        say("> = <: facts that A does better, equally well and worse at")


def print_methods(found: Sequence[Mapping[str, Any]]) -> None:
    """Name, what it does, source, what it needs."""
    rows = [(m["name"], m["summary"], m["source"], ", ".join(m["needs"]) or "-") for m in found]
    stdout().print(make_table(("method", "what it does", "source", "needs"), rows))


def _name(row: Row) -> str:
    label = row.label.replace("[", "\n[", 1)
    return label if row.status == "done" else f"{label}\n({row.status})"


def _estimate(row: Row, metric: str, *, interval: bool) -> str:
    found = row.scores.get(metric)
    if found is None:
        return "-"
    low, high = (f"{end:.2f}".removeprefix("0") for end in (found.low, found.high))
    return f"{found.mean:.3f}\n{low}-{high}" if interval else f"{found.mean:.3f}"


def _difference(one: Difference) -> tuple[str, ...]:
    between = one.difference
    return (
        one.metric,
        f"{one.a.mean:.3f}",
        f"{one.b.mean:.3f}",
        f"{between.mean:+.3f} [{between.low:+.2f}, {between.high:+.2f}]",
        f"{one.better}/{one.equal}/{one.worse}",
        {"A higher": "A", "B higher": "B"}.get(one.verdict, "not shown"),
    )


def _sizes(one: Comparison) -> str:
    return f"{one.a.batch_size} for A and {one.b.batch_size} for B"
