"""Draws the pictures of the documentation out of the committed records, with the package's own charts.

python docs/pictures.py        # or `make pictures`; writes docs/pictures/*.png
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from statistics import fmean
from typing import Any

from nmke.bench.groups import MEAN
from nmke.bench.record import read_cells
from nmke.bench.table import make_table
from nmke.viz.figures import Axis, Figure, Series, share
from nmke.viz.png import draw_png

RECORDS = Path(__file__).parents[1] / "benchmarks" / "results"
BOARD = Path(__file__).parents[1] / "benchmarks" / "leaderboard"
PLACE = Path(__file__).parent / "pictures"
# What the record of one set of targets under different masks calls them, and what the picture does.
MASKS = {
    "none": "all neurons",
    "entropy, write direction": "8 %, by write direction",
    "10 %, write direction": "10 %, by write direction",
    "10 %, key energy over covariance": "10 %, by key energy",
    "10 %, coefficient": "10 %, by coefficient",
    "10 %, random, seed 0": "10 %, by lot",
    "10 %, random, seed 1": "10 %, by lot again",
}


def masks() -> Figure:
    """Which neurons an edit writes into: scores of one set of targets under different masks."""
    cells = _record("research_edit_masks")["cells"]
    names = [name for name in MASKS if name in cells]
    rows = tuple(float(place) for place in range(len(names)))

    def series(metric: str, number: int) -> Series:
        scores = [cells[name]["scores"] for name in names]
        low, high = zip(*(each["intervals"][metric] for each in scores), strict=True)
        return Series(
            metric, tuple(s[metric] for s in scores), rows, low=low, high=high, mark="dots", colour=number
        )

    return Figure(
        id="masks",
        title="The same targets written into different neurons",
        caption="",
        x=share("score, teacher-forced, with 95 % interval"),
        y=Axis("", categories=tuple(MASKS[name] for name in names)),
        series=tuple(series(m, i) for i, m in enumerate(("reliability", "generalization", "locality"))),
    )


def leaderboard() -> Figure:
    """The leaderboard's largest batches: the mean of the three scores of every method, the best on top.

    Of the sets of seeds, the one that most methods ran with.
    """
    rows = make_table(read_cells(BOARD)).rows
    size = max(row.batch_size for row in rows)
    rows = tuple(row for row in rows if row.batch_size == size)
    ((seeds, _),) = Counter(row.seeds for row in rows).most_common(1)
    found = {(row.dataset, row.label): row.scores[MEAN] for row in rows if row.seeds == seeds}
    sets = sorted({dataset for dataset, _ in found})
    labels = sorted(
        {label for _, label in found},
        key=lambda label: -fmean(e.mean for (_, name), e in found.items() if name == label and e),
    )

    def series(dataset: str, number: int) -> Series:
        held = [(float(i), e) for i, label in enumerate(labels) if (e := found.get((dataset, label)))]
        return Series(
            dataset,
            tuple(e.mean for _, e in held),
            tuple(place + 0.12 * (2 * number - len(sets) + 1) for place, _ in held),
            low=tuple(e.low for _, e in held),
            high=tuple(e.high for _, e in held),
            mark="dots",
            colour=number,
        )

    return Figure(
        id="leaderboard",
        title=f"100 facts in batches of {size}: mean of the three scores",
        caption="",
        x=share("mean of reliability, generalization and locality, with 95 % interval"),
        y=Axis("", categories=tuple(labels)),
        series=tuple(series(dataset, number) for number, dataset in enumerate(sets)),
    )


def streams() -> Figure:
    """What a stream of edits leaves: the mean of the three scores after so many."""
    drawn = (("nmke", 10), ("nmke", 100), ("nmke, no mask", 100), ("alphaedit", 100))

    def series(name: str, batch: int, number: int) -> Series:
        cells = _record("research_streams")["cells"][name]
        setup = {"model": "smollm2-135m", "data": "counterfact", "batch": batch, "seed": 0}
        points = next(cell["points"] for cell in cells if cell["setup"] == setup)
        held = sorted((int(edits), found["mean"]) for edits, found in points.items() if "mean" in found)
        return Series(
            f"{name}, batches of {batch}",
            tuple(float(edits) for edits, _ in held),
            tuple(e["mean"] for _, e in held),
            low=tuple(e["low"] for _, e in held),
            high=tuple(e["high"] for _, e in held),
            colour=number,
        )

    return Figure(
        id="streams",
        title="CounterFact: what a stream of edits leaves",
        caption="",
        x=Axis("edits"),
        y=share("mean of the three scores"),
        series=tuple(series(*each, number) for number, each in enumerate(drawn)),
    )


def depth() -> Figure:
    """How much a single neuron adds to the answer's log-probability, by layer."""
    layers = _record("neurons_example")["metrics"]["lps"]["layers"]
    places = tuple(float(layer["layer"]) for layer in layers)
    return Figure(
        id="depth",
        title="What one neuron does for an answer, by layer",
        caption="",
        x=Axis("layer of SmolLM2-135M", whole=True),
        y=Axis("log-probability increase, nats"),
        series=(
            Series("largest", places, tuple(float(layer["max"]) for layer in layers), colour=0),
            Series("smallest", places, tuple(float(layer["min"]) for layer in layers), colour=1),
        ),
    )


def flat() -> Figure:
    """What an edit costs as the memory of earlier ones grows."""
    points = _record("flat_cost")["points"]
    return Figure(
        id="flat",
        title="The price of an edit does not grow with the stream",
        caption="",
        x=Axis("edits written before", log=True),
        y=Axis("CPU milliseconds per edit, tiny model", low=0.0),
        series=(
            Series(
                "cost",
                tuple(float(point["edit"]) for point in points),
                tuple(1000 * point["cpu_seconds_per_edit"] for point in points),
            ),
        ),
    )


def _record(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RECORDS / f"{name}.json").read_text(encoding="utf-8"))
    return found


def main() -> None:
    """Draw all of them."""
    PLACE.mkdir(exist_ok=True)
    for figure in (masks(), leaderboard(), streams(), depth(), flat()):
        (PLACE / f"{figure.id}.png").write_bytes(draw_png(figure))


if __name__ == "__main__":
    main()
