"""Time and bytes of each stage against its floor, the literal published formulas beside them, and how they scale.

    python benchmarks/stages.py [--shape tiny|smollm2|8b] [--full]

Weights are random, so that nothing is downloaded. The record is written after every measurement; a stage that
fails leaves its error in the record and the rest goes on. `--full` goes to batches of 256 and 5000 edits.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from record import write_record
from speed import stages
from speed.floors import Stage, measure_peaks
from speed.models import SHAPES, random_model


class Record:
    """Collects measurements and writes them as they come."""

    def __init__(self, name: str, about: dict[str, Any], peaks: Any) -> None:
        self.name, self.about, self.peaks = name, about, peaks
        self.stages: list[dict[str, Any]] = []
        self.errors: dict[str, str] = {}

    def take(self, name: str, found: Callable[[], Iterator[Stage]]) -> None:
        """Measure one kind of stage."""
        try:
            for measured in found():
                row = measured.record(self.peaks)
                self.stages.append(row)
                ratio = f"{row['times_floor']:.1f} x floor" if row["times_floor"] else ""
                print(
                    f"{measured.name:44s} {measured.seconds:10.4f} s  {ratio:16s} {measured.setting}",
                    flush=True,
                )
                self.write()
        except (
            RuntimeError,
            ValueError,
            MemoryError,
        ) as error:  # such as out of memory: the next stage may fit
            self.errors[name] = f"{type(error).__name__}: {error}"
            print(f"{name}: {self.errors[name]}", file=sys.stderr, flush=True)
            self.write()

    def write(self) -> Path:
        """The record so far."""
        about = {**self.about, "peaks": vars(self.peaks)}
        return write_record(self.name, {**about, "stages": self.stages, "errors": self.errors})


def measure(
    shape_name: str, record_name: str, *, full: bool, device: str = "auto", repeats: int = 3
) -> Record:
    """Everything that one process can measure on a model of this shape."""
    target = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    shape, dtype = SHAPES[shape_name], torch.bfloat16 if target.type == "cuda" else torch.float32
    peaks = measure_peaks(target, 256 if shape_name == "tiny" else None)
    model = random_model(shape, target, dtype)
    windows = 16 if shape_name == "tiny" else max(64, shape.d_mlp // 128)
    subject = stages.Subject(model, shape, {}, repeats)
    about = {
        "shape": {"name": shape_name, **vars(shape)}, "device": str(target), "dtype": str(dtype),
        "state": stages.state_bytes(subject),
    }  # fmt: skip
    record = Record(record_name, about, peaks)
    record.take("statistics", lambda: stages.statistics(subject))  # before anything else is in memory
    subject.stats.update(stages.gather(model, shape, windows))
    batches, remembered = (1, 4, 16), (0, 64, 256)
    if full:
        batches, remembered = (1, 10, 100, 256), (0, 100, 1000, 2000, 5000)
    elif shape_name == "tiny":
        batches, remembered = (1, 4), (0, 30)
    record.take("keys", lambda: stages.keys(subject, batches))
    record.take("solve", lambda: stages.solves(subject, remembered))
    record.take("attribution", lambda: stages.attribution(subject, batches[:3]))
    record.take("targets", lambda: stages.targets(subject, batches))
    record.take("whole", lambda: stages.whole(subject, batches[:3]))
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="smollm2")
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--repeats", type=int, default=3)
    asked = parser.parse_args()
    record = measure(asked.shape, f"stages_{asked.shape}", full=asked.full, repeats=asked.repeats)
    print(record.write())


if __name__ == "__main__":
    main()
