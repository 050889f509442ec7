"""Settings: defaults of the papers, unknown names, values out of range, files."""

import pytest

from nmke.attribution import neuron_scores
from nmke.config import EditConfig, read_config
from nmke.editors import methods
from nmke.errors import ConfigError


def test_every_setting_describes_itself():
    assert all(field.description for field in EditConfig.model_fields.values())


def test_every_methods_defaults_are_settings():
    for entry in methods:
        config = entry.value.fill(EditConfig.create(method=entry.name))
        for name, value in entry.value.defaults.items():
            assert getattr(config, name) == value
    assert EditConfig().method in methods
    assert EditConfig().attribution in neuron_scores


def test_none_stands_for_the_default():
    assert EditConfig.create(lr=None, steps=3) == EditConfig.create(steps=3)


def test_filled_leaves_what_was_set():
    config = EditConfig.create(l2=3.0, lr=0.5).filled({"l2": 10.0, "lr": 1.0, "mask": "entropy"})
    assert (config.l2, config.lr, config.mask) == (3.0, 0.5, "entropy")
    again = config.filled({"mask": "none", "steps": 4})
    assert (again.mask, again.steps) == ("entropy", 4)


@pytest.mark.parametrize(
    "setting, message",
    [
        ({"lrr": 1}, r"unknown setting 'lrr'; did you mean 'lr'\?"),
        ({"colour": 1}, r"unknown setting 'colour'; known: method, layers, "),
        ({"steps": 0}, r"setting 'steps' is 0: input should be greater than 0"),
        ({"lr": -1}, r"setting 'lr' is -1: "),
        ({"lr": "fast"}, r"setting 'lr' is 'fast': .* number"),
        ({"mask": "entropic"}, r"setting 'mask' is 'entropic': input should be 'entropy', 'random'"),
        ({"ratio": 0}, r"setting 'ratio' is 0: "),
        ({"ratio": 1.5}, r"setting 'ratio' is 1\.5: "),
        ({"layers": (4, "x")}, r"setting 'layers\.1' is 'x': "),
        ({"l2": -1.0}, r"setting 'l2' is -1\.0: "),
        (
            {"lrr": 1, "steps": 0},
            r"unknown setting 'lrr'.*setting 'steps'|setting 'steps'.*unknown setting 'lrr'",
        ),
    ],
)
def test_what_is_wrong_with_a_setting_is_said(setting, message):
    with pytest.raises(ConfigError, match=message):
        EditConfig.create(**setting)


def test_configs_are_frozen_and_survive_a_round_trip():
    config = EditConfig.create(layers=[4, 5], mask="fixed", seed=3)
    assert EditConfig.create(**config.model_dump(exclude_unset=True)) == config
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 4  # type: ignore[misc]


def test_settings_are_read_from_yaml(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("method: memit\nlayers: [4, 5]\nlr: 0.2\n", encoding="utf-8")
    config = EditConfig.create(**read_config(path))
    assert (config.method, config.layers, config.lr) == ("memit", (4, 5), 0.2)


@pytest.mark.parametrize(
    "content, message",
    [
        (None, r"config '.*run\.yaml' cannot be read: .*; give a YAML file of settings"),
        (b"a: [1", r"config '.*run\.yaml' cannot be read"),
        (b"\xff\xfe\x00", r"config '.*run\.yaml' cannot be read"),
        (b"- 1\n- 2\n", r"config '.*run\.yaml' is not a mapping; write one `setting: value` per line"),
        (b"", r"config '.*run\.yaml' is not a mapping"),
    ],
)
def test_files_that_hold_no_settings_are_named(tmp_path, content, message):
    path = tmp_path / "run.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        read_config(path)


def test_a_corpus_file_is_kept_by_its_whole_path_and_a_name_as_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("text.txt", "self"):
        (tmp_path / name).write_text("words")
    assert EditConfig.create(corpus="text.txt").corpus == str(tmp_path / "text.txt")
    for name in ("self", "hf:wikitext", "gone.txt"):
        assert EditConfig.create(corpus=name).corpus == name
