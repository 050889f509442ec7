"""The folder of a run: begun whole or not at all, one writer, nothing lost and nothing left behind."""

import json
import os
from pathlib import Path

import pytest
import torch
from tests import runs

from nmke.errors import LedgerError, RequestError, VerifyError
from nmke.run_folder import BaseInfo, RunFolder
from nmke.run_start import delete_run

BASE = BaseInfo("smollm2-135m", "smollm2-135m", "f" * 64, "float32")


def create(root: Path) -> RunFolder:
    return RunFolder.create(root, BASE, ("", "The old harbour. "), "2026-01-01T00:00:00+00:00", "0.1")


def test_a_new_folder_says_what_it_edits(tmp_path):
    folder = create(tmp_path / "deep" / "run")
    assert RunFolder.exists(folder.root) and RunFolder.open(folder.root).base == BASE
    assert folder.contexts == ("", "The old harbour. ")
    assert folder.edits.is_dir() and folder.head.is_dir()
    assert folder.read_manifest()["schema"] == "nmke.run/1"


def test_an_occupied_place_is_refused_and_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(LedgerError, match=r"exists and is not empty; continue a run with --resume"):
        create(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    with pytest.raises(LedgerError, match="not empty"):
        create(tmp_path / "notes.txt")
    folder = create(tmp_path / "run")
    with pytest.raises(LedgerError, match="not empty"):
        create(folder.root)


def test_what_a_process_killed_at_the_beginning_left_does_not_count(tmp_path):
    root = tmp_path / "run"
    (root / "edits").mkdir(parents=True)
    (root / "lock").write_text("123")
    (root / ".nmke.json.123.tmp").write_text('{"schema"')
    assert create(root).base == BASE
    (tmp_path / "other" / "edits").mkdir(parents=True)
    (tmp_path / "other" / "edits" / "000001.safetensors").write_bytes(b"kept")
    with pytest.raises(LedgerError, match="not empty"):
        create(tmp_path / "other")


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(RequestError, match=r"is not a run folder: it has no nmke\.json"):
        RunFolder.open(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is damaged"),
        ("[]", "is damaged"),
        ('{"schema": "nmke.run/1"}', "is damaged"),
        ('{"schema": "nmke.run/1", "base": {"source": "x"}}', "is damaged"),
        ('{"schema": "nmke.run/1", "base": {"colour": "x"}}', "is damaged"),
        (None, "schema 'nmke.run/99', this version reads 'nmke.run/1'; update nmke"),
    ],
)
def test_a_damaged_manifest_is_named(tmp_path, content, message):
    folder = create(tmp_path / "run")
    if content is None:
        content = json.dumps({**folder.read_manifest(), "schema": "nmke.run/99"})
    folder.manifest.write_text(content)
    with pytest.raises(LedgerError, match=message):
        _ = folder.base


def test_leftovers_go_and_named_files_stay(tmp_path):
    folder = create(tmp_path / "run")
    kept, orphan = folder.root / folder.edits_name(1), folder.root / folder.edits_name(2)
    half, other = folder.edits / ".000002.safetensors.77.tmp", folder.edits / "notes.txt"
    foreign = folder.edits / ".tmpqK3vXa"  # as the writer of safetensors names what it has not finished
    for path in (kept, orphan, half, foreign, other, folder.root / folder.head_name(1)):
        path.write_bytes(b"x")
    assert folder.newest_file() == 2
    folder.remove_leftovers({folder.edits_name(1)})
    assert sorted(p.name for p in folder.edits.iterdir()) == [kept.name, other.name]
    assert list(folder.head.iterdir()) == [] and folder.newest_file() == 1


def test_the_lock_is_held_once_and_freed(tmp_path):
    folder = create(tmp_path / "run")
    held = rf"is being written by process {os.getpid()}"
    with folder.locked(), pytest.raises(LedgerError, match=held), folder.locked():
        pass
    with folder.locked():
        pass


def test_only_runs_are_deleted(tmp_path):
    folder = create(tmp_path / "run")
    with folder.locked(), pytest.raises(LedgerError, match="is being written"):
        delete_run(folder.root)
    delete_run(folder.root)
    assert not folder.root.exists()
    (tmp_path / "empty").mkdir()
    delete_run(tmp_path / "empty")
    (tmp_path / "file").write_text("mine")
    for other in (tmp_path, tmp_path / "file"):
        with pytest.raises(LedgerError, match="deletes run folders only"):
            delete_run(other)


# ---------------------------------------------------------------- what `verify` sees in the files


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("finished") / "run"
    with runs.open_run(root) as session:
        runs.edit_all(session, runs.facts(4))
        session.undo()
    return root


def files_of(root: Path) -> list[Path]:
    return sorted(p for p in root.rglob("*") if p.suffix in (".safetensors", ".json"))


def test_every_file_of_a_run_is_checked(finished):
    names = [str(path.relative_to(finished)) for path in files_of(finished)]
    assert names == [
        "edits/000001.safetensors",
        "edits/000002.safetensors",
        "head/000003.safetensors",
        "nmke.json",
        "reproduce.json",
    ]


@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("where", [0.02, 0.5, 1.0])
def test_a_changed_byte_in_any_file_shows(finished, number, where):
    path = files_of(finished)[number]
    content = path.read_bytes()
    at = min(int(where * len(content)), len(content) - 1)
    if path.suffix == ".json":
        at = content.rindex(b"0.1")  # inside a value: a manifest that cannot be read is refused before
    path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    try:
        with (
            pytest.raises(VerifyError, match=r"changed|content hash") as found,
            runs.open_run(finished) as session,
        ):
            session.verify()
        assert found.value.exit_code == 7
    finally:
        path.write_bytes(content)
    with runs.open_run(finished) as session:
        assert session.verify()["files"] == 3


def test_a_missing_file_shows(finished):
    path = finished / "edits" / "000002.safetensors"
    content = path.read_bytes()
    path.unlink()
    try:
        with (
            runs.open_run(finished) as session,
            pytest.raises(VerifyError, match=f"{path.name} .* is missing"),
        ):
            session.verify()
    finally:
        path.write_bytes(content)


def test_other_weights_are_refused(finished):
    with pytest.raises(LedgerError, match=r"edits weights .*; give the original base model"):
        runs.open_run(finished, runs.model(torch.bfloat16))


def test_weights_changed_outside_the_session_show(finished):
    with runs.open_run(finished) as session:
        first, projection = torch.tensor([0]), session.weights.projection(1)
        column = projection.columns(first)
        projection.restore(first, column * 2)
        with pytest.raises(VerifyError, match="the ledger says"):
            session.verify()
        with pytest.raises(LedgerError, match="changed outside the session"):
            session.undo()
        projection.restore(first, column)
        session.verify()
