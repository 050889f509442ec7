"""The stage benchmark on a tiny shape: every stage is measured, beside its floor and the literal formulas."""

import importlib
import json
import math
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
NAMES = ("gpu", "stages", "record", "speed", "speed.stages", "speed.floors", "speed.models", "speed.literal")


@pytest.fixture
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """`benchmarks/gpu.py`, its records going elsewhere."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = importlib.import_module("gpu")
    monkeypatch.setattr(sys.modules["record"], "RESULTS", tmp_path)
    yield module
    for name in NAMES:
        sys.modules.pop(name, None)


@pytest.mark.model  # its tier for its time: no model is loaded
def test_every_stage_is_measured_beside_its_floor_and_the_literal_formula(gpu, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--smoke", "--repeats", "1"])
    gpu.main()
    record = json.loads((tmp_path / "gpu_tiny.json").read_text(encoding="utf-8"))
    assert record["errors"] == {}
    rows = record["stages"]
    assert {row["name"] for row in rows} >= {
        "key statistics",
        "keys",
        "solve, one layer",
        "AlphaEdit's dual, one layer",
        "MEMIT's solve, literal, one layer",
        "AlphaEdit's solve, literal, one layer",
        "attribution, one layer",
        "attribution, literal, one prompt and layer",
        "target values",
        "whole batch, a mask per edit",
        "whole batch, a mask per batch",
    }
    assert all(row["seconds"] > 0 and math.isfinite(row["floor_seconds"]) for row in rows)
    literal = [row["detail"] for row in rows if row["name"].startswith("MEMIT's solve")]
    assert all(detail["largest_relative_difference"] < 1e-6 for detail in literal)
    verdicts = record["verdicts"]
    assert verdicts["largest_error_nats"]["holds"] and verdicts["state_gib"]["holds"]
    assert "largest_error_nats" in capsys.readouterr().out
