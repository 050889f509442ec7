"""The findings' records as Markdown tables, as they stand in docs/neurons.md.

python benchmarks/findings/summary.py
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial, reduce
from operator import getitem
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parents[1] / "results"
Json = dict[str, Any]


def record(name: str) -> Json | None:
    """A finding's record, None before it was made."""
    path = RESULTS / f"finding_{name}.json"
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A Markdown table."""
    for row in (columns, ["---"] * len(columns), *rows):
        print("| " + " | ".join(row) + " |")
    print()


def three(values: Sequence[float], form: str = "{:.2f}") -> str:
    """Mean with its interval."""
    mean, low, high = (form.format(value) for value in values)
    return f"{mean} [{low}, {high}]"


def shares(values: Sequence[float]) -> str:
    """Mean with its interval, in per cent."""
    return three(values, "{:.0%}")


def of(estimate: Json, form: str = "{:.2f}") -> str:
    """An estimate."""
    return three((estimate["mean"], estimate["low"], estimate["high"]), form)


def number(value: float) -> str:
    """Two digits."""
    return f"{value:.2f}"


def seeds(cells: Json, show: Callable[[Any], str], *path: str) -> str:
    """What stands at `path` in the cell of every seed, a dash where it is missing."""
    shown = []
    for seed in sorted(cells):
        try:
            shown.append(show(reduce(getitem, path, cells[seed])))
        except KeyError:
            shown.append("-")
    return " · ".join(shown)


def depth(found: Json) -> None:
    """Depth of the two kinds."""
    columns = ("score", "general: depth", "last third", "specific: depth", "last third", "in both sets")
    for share in ("0.001", "0.01", "0.05"):
        print(f"top {share} of all neurons, seed 0 · seed 1\n")
        rows = []
        for name, cells in found["cells"].items():
            row = [name]
            for kind in ("general", "specific"):
                row.append(seeds(cells, three, "ranked", share, kind, "centre"))
                row.append(seeds(cells, shares, "ranked", share, kind, "top_third"))
            row.append(seeds(cells, lambda one: f"{one['overlap'] / one['neurons']:.0%}", "ranked", share))
            rows.append(row)
        table(columns, rows)
    rows = [
        [name, *(seeds(cells, recurring, "recurring", kind) for kind in ("general", "specific"))]
        for name, cells in found["cells"].items()
    ]
    table(("score, by recurrence", "general: depth", "specific: depth"), rows)


def recurring(one: Json) -> str:
    """Depth and size of a set found by recurrence."""
    return f"{three(one['centre'])} (n {one['neurons']})"


def silence(found: Json) -> None:
    """Losses without some neurons."""
    forms = {"mmlu": "{:.1%}", "known": "{:.1%}"}
    for name, value in found["unsilenced"].items():
        print(f"unsilenced {name}: {of(value, forms.get(name, '{:.3f}'))}, n {value['n']}\n")
    measures = ("mmlu", "mmlu_log_prob", "known", "known_log_prob", "text_log_prob")
    rows = []
    for size, cells in found["cells"].items():
        for kind in ("general", "specific", "random"):
            lost = [
                seeds(cells, partial(of, form=forms.get(name, "{:.3f}")), kind, "measures", name, "lost")
                for name in measures
            ]
            rows.append([size, kind, *lost])
        rows.append([size, "in both sets", seeds(cells, str, "in_both_sets"), *[""] * 4])
    table(("k", "silenced", "MMLU", "log p (letter)", "known facts", "log p (fact)", "log p (text)"), rows)


def masks_between(found: Json) -> None:
    """Likeness of masks."""
    kinds = ("paraphrases of one fact", "facts of one relation", "different relations")
    rows = [
        [which, name, measure, *(seeds(cells, of, which, kind, measure) for kind in kinds)]
        for which in ("union", "top")
        for name, cells in found["cells"].items()
        for measure in ("jaccard", "above_chance")
    ]
    table(("mask", "score", "measure", *kinds), rows)


def sweeps(found: Json) -> None:
    """Statistics of every setting."""
    names = ("general_entropy", "general_ratio", "specific_entropy", "specific_ratio", "kept", "jaccard")
    every = dict.fromkeys(name for cells in found["cells"].values() for name in cells)
    exact = "{:.3f}".format
    rows = [[name, *(seeds(found["cells"], exact, name, m, "mean") for m in names)] for name in every]
    table(("setting", *names), rows)


def metrics(found: Json) -> None:
    """Agreement with ablation, stability, cost."""
    for token, cells in found["cells"].items():
        print(f"scored at the {token} token\n")
        truth, steady = cells["truth"], cells["stability"]
        if not truth:
            continue
        layers = list(truth["0"])
        names = list(truth["0"][layers[0]]["metrics"])
        for measure in ("signed", "size", "top_recall", "top_recall_size"):
            rows = [
                [name, *(seeds(truth, number, i, "metrics", name, measure, "mean") for i in layers)]
                for name in names
            ]
            table((measure, *(f"layer {i}" for i in layers)), rows)
        rows = [
            [name, *(seeds(steady, of, "metrics", name, kind) for kind in ("paraphrases", "other_facts"))]
            for name in steady.get("0", {"metrics": ()})["metrics"]
        ]
        table(("stability", "paraphrases", "other facts"), rows)
        if "cost" in cells:
            rows = [[name, f"{value:.3f}"] for name, value in cells["cost"]["cpu_seconds"].items()]
            table((f"cost, layer {cells['cost']['layer']}", "CPU seconds per prompt"), rows)


def quality(found: Json) -> None:
    """Edit quality of every setting."""
    cells = found["cells"]
    for cell in cells.values():
        for one in cell.values():
            one["times"] = one["perplexity"] / cell["unedited"]["perplexity"]
    rows = [
        [
            name,
            seeds(cells, "{:.0%}".format, name, "kept"),
            *(seeds(cells, of, name, metric) for metric in ("reliability", "generalization", "locality")),
            seeds(cells, number, name, "times"),
        ]
        for name in cells["0"]
        if name != "unedited"
    ]
    table(("setting", "kept", "Rel", "Gen", "Loc", "perplexity, times"), rows)


def main() -> None:
    """Print what there is."""
    for show in (depth, silence, masks_between, sweeps, metrics, quality):
        found = record(show.__name__)
        if found is not None:
            print(f"## {show.__name__} (commit {found['commit']}, {found['created']})\n")
            print(f"missing: {', '.join(found['missing']) or 'nothing'}\n")
            show(found)


if __name__ == "__main__":
    main()
