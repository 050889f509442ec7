"""Where settings come from, and what happens to wrong ones."""

from pathlib import Path

import pytest
from tests.cli.conftest import Nmke

from nmke.cli.settings import merge
from nmke.config import EditConfig, parse_layers
from nmke.errors import ConfigError


def test_flags_win_over_variables_over_config_over_recipe(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("steps: 3\nlr: 0.3\nclamp: 0.3\n")
    monkeypatch.setenv("NMKE_STEPS", "2")
    monkeypatch.setenv("NMKE_LR", "0.2")
    recipe = {"steps": 4, "lr": 0.4, "clamp": 0.4, "batch_size": 4}
    given = EditConfig.create(**merge({"steps": 1}, file, recipe))
    assert (given.steps, given.lr, given.clamp, given.batch_size) == (1, 0.2, 0.3, 4)
    assert given.seed == EditConfig().seed


def test_auto_layers_undo_what_the_recipe_says() -> None:
    assert "layers" not in merge({"layers": "auto"}, None, {"layers": [4, 5]})


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("auto", None),
        ("4-8", (4, 5, 6, 7, 8)),
        ("4,5", (4, 5)),
        ("1, 3-4", (1, 3, 4)),
        ([2, 3], (2, 3)),
        (7, (7,)),
    ],
)
def test_layers_are_read_from_every_spelling(text: object, layers: tuple[int, ...] | None) -> None:
    assert parse_layers(text) == layers


@pytest.mark.parametrize(("text", "held"), [("true", True), ("false", False)])
def test_a_switch_is_given_as_a_word(monkeypatch: pytest.MonkeyPatch, text: str, held: bool) -> None:
    assert merge({"hold_earlier": text}) == {"hold_earlier": held}
    monkeypatch.setenv("NMKE_HOLD_EARLIER", text)
    assert merge({}) == {"hold_earlier": held}


def test_unreadable_layers_are_named() -> None:
    with pytest.raises(ConfigError, match=r"layers '4\.\.8' cannot be read; write 'auto', a range as '4-8'"):
        parse_layers("4..8")


def test_a_misspelt_variable_is_an_error_and_a_strange_one_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NMKE_SOMETHING_ELSE_ENTIRELY", "1")
    assert merge({}) == {}
    monkeypatch.setenv("NMKE_BATCHSIZE", "3")
    with pytest.raises(
        ConfigError, match="unknown variable 'NMKE_BATCHSIZE'; did you mean 'NMKE_BATCH_SIZE'"
    ):
        merge({})


def test_every_setting_is_a_flag_with_its_description(nmke: Nmke, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    shown = nmke("edit", "--help").out
    for name, field in EditConfig.model_fields.items():
        assert f"--{name.replace('_', '-')}" in shown
        assert str(field.description)[:19] in shown


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("edit", "m", "--bach-size", "3"), "--batch-size"),
        (("edt",), "edit"),
        (("edit", "m"), "no fact was given"),
        (("edit", "m", "-p", "The {x} is", "-t", "y", "--steps", "many"), "--steps"),
        (("edit", "m", "-p", "The {x} is", "-t", "y", "--mask", "entropi"), "--mask"),
        (("edit", "m", "-p", "The {x} is", "-t", "y", "--clamp", "-1"), "clamp"),
        (("edit", "m", "-p", "The {x} is", "-t", "y", "--facts", "f"), "give one of them"),
        (("edit", "m", "-p", "The {x} is", "-t", "y", "--resume", "--force"), "contradict"),
        (("eval", "m", "--facts", "f", "--protocol", "teecher_forced"), "teacher_forced"),
    ],
)
def test_wrong_usage_exits_2_with_one_line(nmke: Nmke, arguments: tuple[str, ...], said: str) -> None:
    done = nmke(*arguments)
    assert done.code == 2 and done.out == ""
    assert done.err.startswith("error: ") and len(done.err.splitlines()) == 1
    assert said in done.err


def test_unknown_names_in_settings_name_the_nearest(
    nmke: Nmke, source: Path, facts: Path, tmp_path: Path
) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("bach_size: 3\n")
    wrong = nmke("edit", source, "--facts", facts, "--config", config, "-o", "run")
    assert wrong.code == 2 and "did you mean 'batch_size'" in wrong.err
    for flag, name, near in (("--method", "menit", "memit"), ("--attribution", "lpz", "lps")):
        wrong = nmke("edit", source, "--facts", facts, flag, name, "-o", "run")
        assert wrong.code == 2 and near in wrong.err
    wrong = nmke("edit", source, "--facts", facts, "--layers", "9", "-o", "run")
    assert wrong.code == 2 and "this model can edit 0 to 2" in wrong.err
    assert not Path("run").exists()
