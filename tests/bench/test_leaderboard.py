"""The committed leaderboard: its plan can be run, and the documentation shows its records and nothing else."""

from pathlib import Path

import pytest

from nmke.bench.plan import Plan
from nmke.bench.record import CELLS, read_cells
from nmke.bench.table import make_table, markdown
from nmke.editors import methods

ROOT = Path(__file__).parents[2]
LEADERBOARD = ROOT / "benchmarks" / "leaderboard"


def test_the_plan_holds_every_method_the_controls_two_seeds_and_three_batch_sizes() -> None:
    plan = Plan.read(LEADERBOARD / "plan.yaml")
    labels = {cell.variant.label for cell in plan.cells()}
    assert set(methods.names()) <= labels
    controls = {"unedited", "nmke[mask=none]", "nmke[mask=random]", "alphaedit[l2=1]", "alphaedit"}
    assert controls <= labels
    assert {cell.config.seed for cell in plan.cells()} == {0, 1}
    assert {cell.config.batch_size for cell in plan.cells()} == {1, 10, 100}
    assert not plan.derived and plan.complete


def test_the_documentation_shows_what_the_command_prints() -> None:
    if not (LEADERBOARD / CELLS).is_dir():
        pytest.skip("no cell of the leaderboard is committed")
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert markdown(make_table(read_cells(LEADERBOARD))) in page
