"""Seconds of the same target values by one process and by several, started as users start them, in turn.

    python benchmarks/ranks.py [--ranks 1 2] [--repeats 2]

Every process has one thread: use no more processes than there are idle cores. Writes `results/ranks_smollm2.json`.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from record import write_record

WORK = Path(__file__).parent / "speed" / "rank_times.py"


def seconds(size: int) -> float:
    """Of one run with `size` processes.

    Raises:
        SystemExit: If it fails; shows the end of what it said.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={size}"]
    done = subprocess.run(
        [*command, str(WORK)],
        capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    if done.returncode:
        sys.exit(done.stderr.strip()[-500:])
    return float(done.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=2)
    asked = parser.parse_args()
    taken: dict[int, list[float]] = {size: [] for size in asked.ranks}
    for _ in range(asked.repeats):
        for size in asked.ranks:
            taken[size].append(seconds(size))
            print(f"{size} ranks: {taken[size][-1]:.1f} s", flush=True)
            rows: list[dict[str, Any]] = [
                {"ranks": size, "seconds": found, "median": statistics.median(found)}
                for size, found in taken.items()
                if found
            ]
            written = write_record("ranks_smollm2", {"edits": 48, "rows": rows})
    print(written)


if __name__ == "__main__":
    main()
