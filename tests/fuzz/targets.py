"""What is fuzzed: every reader of a file that a stranger may have written, as a function of the file's bytes.

A target returns, or raises an `NmkeError`; any other exception, more than ten seconds, a gigabyte of memory, or a file
that appears outside its folder is a fault. Used three ways: on the saved inputs of `nasty.py` and on variations of
them by hypothesis (`test_readers.py`, in every test run), and without end under atheris (`make fuzz`).
"""

import contextlib
import copy
import shutil
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

from tests import runs, tiny

from nmke.batch_file import read_before, read_columns, read_head, read_rows, read_writes
from nmke.bench.plan import Plan
from nmke.bench.record import CellRecord
from nmke.config import EditConfig, parse_layers, read_config
from nmke.damage import read_as
from nmke.errors import NmkeError
from nmke.evaluation.base_outputs import BaseOutputs
from nmke.evaluation.score_records import read_scores
from nmke.export.delta import apply_delta
from nmke.facts import find_faults, read_facts
from nmke.journal import install
from nmke.ledger import Ledger
from nmke.models.load import EditableModel, load_model
from nmke.run_folder import RunFolder
from nmke.weights_state import WeightsState

Target = Callable[[Path], object]
TARGETS: dict[str, tuple[str, Target]] = {}


def target(file: str) -> Callable[[Target], Target]:
    """Register a reader; it is given the path of a file of that name with the bytes in it."""

    def register(read: Target) -> Target:
        TARGETS[read.__name__] = (file, read)
        return read

    return register


def run_target(name: str, content: bytes, folder: Path) -> NmkeError | None:
    """Let a target read the bytes in a folder of its own; the error it answered with, None when it read them."""
    file, read = TARGETS[name]
    place = folder / name
    path = place / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    try:
        read(path)
    except NmkeError as error:
        return error
    finally:
        shutil.rmtree(place, ignore_errors=True)
    return None


@cache
def tiny_model() -> EditableModel:
    """A model that head files and deltas are put into, and taken out of again."""
    return runs.model()


@cache
def model_folder(where: Path) -> Path:
    """A saved tiny model, parts of which are replaced by the bytes."""
    return tiny.save_tiny(where / "whole-model")


def beside(path: Path) -> Path:
    """The folder around a file, filled up with the other files of a tiny model."""
    for file in model_folder(path.parents[1]).iterdir():
        if not (path.parent / file.name).exists():
            shutil.copy(file, path.parent)
    return path.parent


@target("facts.jsonl")
def facts(path: Path) -> None:
    find_faults(path)
    read_facts(path)


@target("recipe.yaml")
def settings(path: Path) -> None:
    for given in (read_config(path), RunFolder(path.parent).recipe):
        EditConfig.create(**{**given, "layers": parse_layers(given.get("layers"))})


@target("plan.yaml")
def plan(path: Path) -> None:
    Plan.read(path).save(path.with_suffix(".again"))


@target("cell.json")
def cell(path: Path) -> None:
    CellRecord.load(path)


@target("ledger.sqlite")
def ledger(path: Path) -> None:
    opened = Ledger(path)
    with contextlib.closing(opened):
        for event in opened.events():
            opened.event(event.seq)
        opened.search("a")
        opened.active()
        opened.file_names()
        opened.verify_chain()


@target("nmke.json")
def manifest(path: Path) -> None:
    folder = RunFolder.open(path.parent)
    assert isinstance(folder.base.source, str)
    assert all(isinstance(text, str) for text in folder.contexts)


@target("edits/000001.safetensors")
def batch(path: Path) -> None:
    for read in (read_before, read_rows, read_columns, read_writes):
        read(path)
    read_rows(path, 0)
    state = WeightsState(tiny_model())
    try:
        with read_as(path.name):
            state.take_back(read_before(path))
    finally:
        state.reset()


@target("head/000001.safetensors")
def head(path: Path) -> None:
    """Whole matrices, and what GRACE, WISE, MEMOIR and IKE look up."""
    state = WeightsState(tiny_model())
    try:
        install(read_head(path), state, path.name)
    finally:
        state.reset()


@target("delta.safetensors")
def delta(path: Path) -> None:
    apply_delta(path, copy.deepcopy(tiny_model()))


@target("scores/a.json")
def scores(path: Path) -> None:
    read_scores(path.parents[1])


@target("base-outputs.json")
def base_outputs(path: Path) -> None:
    BaseOutputs.load(path)


@target("model.gguf")
def gguf(path: Path) -> None:
    load_model(str(path), device="cpu")


@target("config.json")
def model_config(path: Path) -> None:
    load_model(str(beside(path)), device="cpu")


@target("model.safetensors")
def model_weights(path: Path) -> None:
    load_model(str(beside(path)), device="cpu")


@target("model.safetensors.index.json")
def model_index(path: Path) -> None:
    folder = beside(path)
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    load_model(str(folder), device="cpu")


if __name__ == "__main__":
    sys.stdout.write("\n".join(TARGETS) + "\n")
