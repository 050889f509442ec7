import os
import re
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from tests.tiny import tiny_llama

from nmke.models.cache import atomic_directory, cache_dir, weights_fingerprint


def test_cache_dir_is_nmke_cache_where_set(monkeypatch, tmp_path):
    monkeypatch.setenv("NMKE_CACHE", str(tmp_path / "here"))
    assert cache_dir() == tmp_path / "here"
    monkeypatch.delenv("NMKE_CACHE")
    assert cache_dir().name == "nmke"


def test_folder_appears_whole_at_the_end_of_the_block(tmp_path):
    target = tmp_path / "deep" / "folder"
    with atomic_directory(target) as building:
        (building / "file").write_text("content")
        assert not target.exists()
    assert (target / "file").read_text() == "content"
    assert [path.name for path in target.parent.iterdir()] == ["folder"]
    assert target.stat().st_mode & 0o777 == 0o777 & ~_umask()


def test_error_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), atomic_directory(tmp_path / "folder") as building:
        (building / "file").write_text("half")
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("replace", "kept"), [(False, "first"), (True, "second")])
def test_existing_folder_stays_unless_it_is_to_be_replaced(tmp_path, replace, kept):
    target = tmp_path / "folder"
    for content in ("first", "second"):
        with atomic_directory(target, replace=replace) as building:
            (building / "file").write_text(content)
    assert (target / "file").read_text() == kept
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_two_builders_of_one_folder_both_succeed(tmp_path):
    target = tmp_path / "folder"
    with atomic_directory(target, replace=True) as one, atomic_directory(target, replace=True) as other:
        (one / "file").write_text("one")
        (other / "file").write_text("other")
    assert (target / "file").read_text() == "one"
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_killed_builder_leaves_no_result_and_the_next_one_cleans_up(tmp_path):
    code = f"""
        import os, signal
        from pathlib import Path
        from nmke.models.cache import atomic_directory
        with atomic_directory(Path({str(tmp_path)!r}) / "folder") as building:
            (building / "file").write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=False)
    assert not (tmp_path / "folder").exists()
    assert len(list(tmp_path.iterdir())) == 1
    with atomic_directory(tmp_path / "folder") as building:
        (building / "file").write_text("whole")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize(("age", "stays"), [(60, True), (48 * 3600, False)])
def test_builder_on_another_machine_is_left_alone_for_a_day(tmp_path, age, stays):
    elsewhere = tmp_path / f".folder.tmp-not-{socket.gethostname()}-1-abc"
    elsewhere.mkdir()
    moment = elsewhere.stat().st_mtime - age
    os.utime(elsewhere, (moment, moment))
    with atomic_directory(tmp_path / "folder"):
        assert elsewhere.exists() == stays


def test_fingerprint_sees_every_bit_and_not_the_object():
    model = tiny_llama()
    before = weights_fingerprint(model)
    assert re.fullmatch("[0-9a-f]{64}", before)
    assert weights_fingerprint(tiny_llama()) == before
    assert weights_fingerprint(tiny_llama(seed=1)) != before
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 5] *= -1
    assert weights_fingerprint(model) != before


def test_fingerprint_reads_bfloat16():
    model = tiny_llama().bfloat16()
    assert weights_fingerprint(model) != weights_fingerprint(model.float())


def _umask() -> int:
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"Umask:\s*(\d+)", status)[1], 8)
