"""What every benchmark record holds besides its numbers: machine, versions, time, commit."""

from __future__ import annotations

import json
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from nmke.bench.machine import machine
from nmke.session import versions

RESULTS = Path(__file__).parent / "results"


def commit() -> str:
    """Short name of the commit that is checked out, "" outside a repository."""
    asked = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()


def write_record(name: str, content: dict[str, Any]) -> Path:
    """Write `results/NAME.json` and return its path."""
    record = {
        "schema": f"nmke.benchmark.{name}/1",
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": machine(),
        "versions": versions(),
        **content,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return path
