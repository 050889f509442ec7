"""Draws the pictures of the documentation out of the committed records, with the package's own charts.

python docs/pictures.py        # or `make pictures`; writes docs/pictures/*.png
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nmke.viz.figures import Axis, Figure, Series, share
from nmke.viz.png import draw_png

RECORDS = Path(__file__).parents[1] / "benchmarks" / "results"
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
    for figure in (masks(), depth(), flat()):
        (PLACE / f"{figure.id}.png").write_bytes(draw_png(figure))


if __name__ == "__main__":
    main()
