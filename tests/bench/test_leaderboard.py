"""The committed leaderboard: its plan can be run, and the documentation shows its records and nothing else."""

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

from nmke.bench.plan import Plan
from nmke.bench.record import read_cells
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


def test_only_finished_cells_of_the_plan_are_committed() -> None:
    planned = {cell.id for cell in Plan.read(LEADERBOARD / "plan.yaml").cells()}
    for cell in read_cells(LEADERBOARD):
        assert cell.status in ("done", "collapsed", "failed"), cell.identity.id
        assert cell.identity.id in planned, f"{cell.identity.id}: settings changed since; run it again"


def test_the_documentation_shows_what_the_command_prints() -> None:
    found = spec_from_file_location("docs_tables", ROOT / "docs" / "tables.py")
    assert found is not None and found.loader is not None
    tables = module_from_spec(found)
    found.loader.exec_module(tables)
    page = tables.on_page_markdown((ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8"))
    assert markdown(make_table(read_cells(LEADERBOARD))) in page
    assert "| `alphaedit` | +" in page, "compared with `nmke` fact by fact"
