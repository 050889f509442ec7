"""The examples run: each on a tiny model, and on the real one, where what they print has to make sense."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
from tests import runs, tiny

from nmke.models.load import load_model

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))
# What each must print on the real model; numbers are looked at by eye, not here.
PRINTED = {
    "compare_methods": ["n = 4, 95 % intervals", "locality       nmke - all neurons:"],
    "export_and_serve": ["the model card names the changed fact: True", "plain transformers says:' Lyon"],
    "fix_a_fact": ["status: written", "verified 1 event", "bit for bit: True"],
    "lifelong_stream": ["other edits were written again", "all hashes fit"],
    "own_method": ["least-squares: p(Lyon)", "know it too: True"],
    "own_metric": ["surprise", "by lot", "n = 4 facts"],
}
# Settings that a method or a batch needs even on a tiny model.
OWN = {
    "own_method": {"method": "least-squares"},
    "own_metric": {"method": "nmke", "mask": "fixed", "ratio": 0.25, "batch_size": 4},
    "compare_methods": {"method": "nmke"},
}


def test_pages_that_show_an_example_take_it_in_whole() -> None:
    pages = "\n".join(page.read_text("utf-8") for page in (EXAMPLES[0].parents[1] / "docs").glob("*.md"))
    shown = {line for line in pages.splitlines() if re.search(r'^\W*8.*"examples/\w+\.py"', line)}
    files = {path.name for path in EXAMPLES}
    assert len(shown) >= 5
    for line in shown:
        found = re.fullmatch(r'--8<-- "examples/(\w+\.py)"', line)  # else the page shows the line
        assert found is not None and found[1] in files, line


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def with_fewer_facts(module: ModuleType) -> ModuleType:
    for name, most in {"FACTS": 4, "STREAM": 6}.items():
        if hasattr(module, name):
            setattr(module, name, getattr(module, name)[:most])
    return module


def test_every_example_is_short_and_says_what_it_prints() -> None:
    assert [path.stem for path in EXAMPLES] == sorted(PRINTED)
    assert all(len(path.read_text(encoding="utf-8").splitlines()) < 60 for path in EXAMPLES)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_on_a_tiny_model(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NMKE_CACHE", str(tmp_path / "cache"))
    module = with_fewer_facts(load(path))
    folder = tiny.save_tiny(tmp_path / "tiny", runs.loud_llama)
    config = runs.config(**{"layers": (1,), "on_collapse": "continue", **OWN.get(path.stem, {})})
    module.main(str(folder), tmp_path, config)
    assert capsys.readouterr().out.strip()


@pytest.mark.model
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_on_the_real_model(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = "smollm2-135m" if path.stem == "export_and_serve" else load_model("smollm2-135m")
    with_fewer_facts(load(path)).main(source, tmp_path)
    printed = capsys.readouterr().out
    missing = [text for text in PRINTED[path.stem] if text not in printed]
    assert not missing, f"not printed: {missing}; printed was {printed}"
