"""Everything that is to be measured on a CUDA machine, at the shape of an 8B model with random weights.

    python benchmarks/gpu.py            # about 20 minutes on one card of 80 GB; writes benchmarks/results/gpu_8b.json
    python benchmarks/gpu.py --smoke    # the same on a tiny shape and on whatever device there is, in seconds

Targets, on one H100: attribution at most 0.25 s for a batch of one edit and 0.03 s per edit in batches of 100, at
least 50 times faster than the literal formula, largest error 1e-3 nats; a whole edit at most 0.4 s in batches of 100;
editor state of five layers at 2,000 edits at most 1.5 GiB; key statistics in at most 24 GB. The record says which hold.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch

from stages import Record, measure


def verdicts(record: Record) -> dict[str, Any]:
    """Each target with what was measured."""
    rows = record.stages

    def of(name: str, **setting: Any) -> dict[str, Any] | None:
        fits = (r for r in rows if r["name"] == name and setting.items() <= r["setting"].items())
        return next(fits, None)

    one, many = of("attribution, one layer", batch=1), of("attribution, one layer", batch=100)
    literal = of("attribution, literal, one prompt and layer")
    whole = of("whole batch, a mask per batch", batch=100)
    statistics = of("key statistics")
    found: dict[str, Any] = {"state_gib": (record.about["state"]["ours_gib"], 1.5)}
    per_edit = "seconds_per_edit_five_layers"
    if one:
        found["attribution_batch_of_one_s"] = (one["detail"][per_edit], 0.25)
    if many:
        found["attribution_per_edit_in_100_s"] = (many["detail"][per_edit], 0.03)
    if one and literal:
        found["literal_over_ours_in_batches_of_one"] = (
            literal["detail"][per_edit] / one["detail"][per_edit],
            50,
        )
        found["largest_error_nats"] = (literal["detail"]["largest_error_nats"], 1e-3)
    if whole:
        found["whole_edit_in_batches_of_100_s"] = (whole["detail"]["seconds_per_edit"], 0.4)
    if statistics and statistics["peak_mb"]:
        found["key_statistics_gb"] = (statistics["peak_mb"] * 2**20 / 1e9, 24)
    at_least = {"literal_over_ours_in_batches_of_one"}
    return {
        name: {
            "measured": value,
            "target": target,
            "holds": value >= target if name in at_least else value <= target,
        }
        for name, (value, target) in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--repeats", type=int, default=3)
    asked = parser.parse_args()
    if not asked.smoke and not torch.cuda.is_available():
        sys.exit("no CUDA device was found; run it on a machine with one, or try it with --smoke")
    shape = "tiny" if asked.smoke else "8b"
    record = measure(shape, f"gpu_{shape}", full=not asked.smoke, repeats=asked.repeats)
    record.about["verdicts"] = verdicts(record)
    for name, row in record.about["verdicts"].items():
        print(
            f"{name:42s} {row['measured']:.4g} (target {row['target']}): {'holds' if row['holds'] else 'MISSED'}"
        )
    print(record.write())


if __name__ == "__main__":
    main()
