from pathlib import Path
from typing import Any

import pytest

from nmke.bench.plan import Plan, parse_span
from nmke.errors import ConfigError


def plan(**changes: Any) -> Plan:
    return Plan.create(**{"model": "tiny", "methods": ("alphaedit", "nmke[mask=random]"), **changes})


def test_every_product_of_the_axes_is_a_cell() -> None:
    made = plan(data=("counterfact", "zsre"), batch_sizes=(1, 10), seeds=(0, 1)).cells()
    assert len(made) == 16
    assert len({cell.id for cell in made}) == 16
    assert [cell.variant.label for cell in made[:2]] == ["alphaedit", "nmke[mask=random]"]
    assert {(cell.config.batch_size, cell.config.seed) for cell in made} == {(1, 0), (1, 1), (10, 0), (10, 1)}


def test_settings_of_the_label_win_over_the_plans_and_have_their_types() -> None:
    first, second = plan(settings={"mask": "none", "steps": 3, "layers": "1-2"}).cells()
    assert (first.config.mask, first.config.steps, first.config.layers) == ("none", 3, (1, 2))
    assert (second.config.mask, second.config.method) == ("random", "nmke")
    assert plan(methods=("alphaedit[l2=10]",)).cells()[0].config.l2 == 10.0


def test_a_method_with_a_largest_batch_runs_once_at_that() -> None:
    cells = plan(methods=("rome", "memit"), batch_sizes=(1, 10)).cells()
    assert [(c.variant.label, c.config.batch_size) for c in cells] == [
        ("rome", 1),
        ("memit", 1),
        ("memit", 10),
    ]


@pytest.mark.parametrize(
    "change",
    [
        {"model": "other"},
        {"records": "1:"},
        {"edits": 7},
        {"order": "file"},
        {"complete": False},
        {"derived": True},
        {"checkpoints": (3,)},
        {"protocols": ("teacher_forced",)},
        {"held_out_tokens": 100},
        {"tasks": ("mmlu",)},
        {"tasks": ("mmlu",), "task_limit": 10},
        {"settings": {"steps": 3}},
        {"dtype": "bfloat16"},
    ],
)
def test_whatever_could_change_a_number_changes_the_cells_name(change: dict[str, Any]) -> None:
    assert not {cell.id for cell in plan().cells()} & {cell.id for cell in plan(**change).cells()}


def test_more_methods_seeds_or_sizes_leave_the_other_cells_names() -> None:
    more = plan(methods=("memit", "alphaedit", "nmke[mask=random]"), seeds=(0, 1), batch_sizes=(10, 100))
    assert {cell.id for cell in plan().cells()} < {cell.id for cell in more.cells()}


def test_a_plan_is_written_and_read_back_and_flags_win(tmp_path: Path) -> None:
    made = plan(records="500:", edits=50, checkpoints=(10, 50), settings={"steps": 3})
    made.save(tmp_path / "plan.yaml")
    assert Plan.read(tmp_path / "plan.yaml") == made
    assert Plan.read(tmp_path / "plan.yaml", edits=20, seeds=None).edits == 20


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"methods": ("nmk",)}, "unknown method 'nmk'; did you mean 'nmke'"),
        ({"methods": ("nmke[maks=random]",)}, "unknown setting 'maks'; did you mean 'mask'"),
        ({"methods": ()}, "plan: setting 'methods'"),
        ({"model": None}, "plan: setting 'model' is missing"),
        ({"methds": ("nmke",)}, "unknown setting 'methds'; did you mean 'methods'"),
        ({"protocols": ("likelyhood",)}, "unknown protocol 'likelyhood'; did you mean 'likelihood'"),
        ({"tasks": ("mmlv",)}, "did you mean 'mmlu'"),
        ({"settings": {"seed": 3}}, "the plan's settings set 'seed', which the plan varies itself"),
        ({"methods": ("nmke[batch_size=3]",)}, "set 'batch_size', which the plan varies itself"),
        ({"settings": {"on_collapse": "rollback"}}, "measured, not taken back"),
        ({"records": "9:3"}, "records '9:3' is no span"),
    ],
)
def test_a_wrong_plan_is_an_error_that_names_the_cure(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        plan(**change)
    assert message in str(error.value)


def test_spans() -> None:
    assert parse_span("3:5") == (3, 5)
    assert parse_span(":5") == (0, 5)
    assert parse_span("500:") == (500, None)
    with pytest.raises(ConfigError, match="is no span"):
        parse_span("5")
