"""Draw a stage record as a roofline: operations per byte against operations per second, on this machine's two roofs.

python benchmarks/roofline.py [benchmarks/results/stages_smollm2.json] [docs/speed-roofline.svg]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot

from record import RESULTS

KINDS = {
    "key statistics": ("#4c72b0", "o"),
    "keys": ("#55a868", "s"),
    "target values": ("#c44e52", "D"),
    "attribution, one layer": ("#8172b2", "^"),
    "solve, one layer": ("#937860", "v"),
}


def draw(record: dict[str, Any], path: Path) -> None:
    """One point per stage and setting; the label gives the batch, or the edits remembered."""
    peaks = record["peaks"]
    figure, axes = pyplot.subplots(figsize=(7.5, 5.0))
    rows = [row for row in record["stages"] if row["name"] in KINDS and row["bytes"] and row["operations"]]
    intensities = [row["operations"] / row["bytes"] for row in rows]
    low, high = min(intensities) / 4, max(intensities) * 4
    xs = [low * (high / low) ** (i / 200) for i in range(201)]
    for dtype, style in (("bfloat16", "-"), ("float32", "--"), ("float64", ":")):
        top = peaks["operations"][dtype]
        axes.plot(xs, [min(top, peaks["bandwidth"] * x) / 1e9 for x in xs], style, color="#444444", lw=1)
        axes.annotate(dtype, (high, top / 1e9), ha="right", va="bottom", fontsize=8, color="#444444")
    seen = set()
    for row, x in zip(rows, intensities, strict=True):
        color, marker = KINDS[row["name"]]
        label = None if row["name"] in seen else f"{row['name']} ({row['dtype']})"
        seen.add(row["name"])
        y = row["operations"] / row["seconds"] / 1e9
        axes.plot(x, y, marker, color=color, ms=6, label=label)
        note = row["setting"].get("remembered", row["setting"].get("batch"))
        if note is not None:
            axes.annotate(str(note), (x, y), xytext=(4, 4), textcoords="offset points", fontsize=7)
    axes.set(xscale="log", yscale="log", xlabel="operations per byte that has to move", ylabel="GFLOP/s")
    axes.set_title(
        f"{record['shape']['name']} on {record['machine']['cuda'] or record['machine']['processor']}"
    )
    axes.grid(alpha=0.25, which="both", lw=0.5)
    axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=3, frameon=False)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def main() -> None:
    source = Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS / "stages_smollm2.json"
    target = (
        Path(sys.argv[2]) if len(sys.argv) > 2 else Path(__file__).parents[1] / "docs" / "speed-roofline.svg"
    )
    draw(json.loads(source.read_text(encoding="utf-8")), target)
    print(target)


if __name__ == "__main__":
    main()
