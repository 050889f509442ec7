"""Every reader on the saved nasty inputs and on variations of them: read, or one clear error; see `targets.py`."""

import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.fuzz.nasty import every_input
from tests.fuzz.targets import TARGETS, run_target

from nmke.errors import NmkeError

SECONDS = 10
MOST_KILOBYTES = 2**20
INPUTS = every_input()
SLOW = ("gguf", "model_config", "model_weights", "model_index")  # transformers loads a model each time
QUICK = sorted(TARGETS.keys() - SLOW)


@contextmanager
def bounded() -> Iterator[None]:
    """Neither ten seconds of the processor, where something hangs, nor a gigabyte more."""

    def out_of_time(_number: int, _frame: FrameType | None) -> None:
        raise TimeoutError(f"{SECONDS} s")

    before = signal.signal(signal.SIGPROF, out_of_time)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < MOST_KILOBYTES


def read(name: str, content: bytes, folder: Path) -> NmkeError | None:
    with bounded():
        error = run_target(name, content, folder)
    assert {path.name for path in folder.iterdir()} <= {"whole-model"}, "something was written elsewhere"
    if error is not None:
        said = str(error)
        assert 20 < len(said) < 2_000 and ("; " in said or ": " in said), said
    return error


def test_every_reader_has_inputs() -> None:
    assert INPUTS.keys() == TARGETS.keys()


@pytest.mark.parametrize(("name", "which"), [(name, which) for name in TARGETS for which in INPUTS[name]])
def test_saved_inputs_read_or_explain(
    name: str, which: str, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path_factory.getbasetemp() / "fuzz"
    folder.mkdir(exist_ok=True)
    monkeypatch.chdir(folder)
    error = read(name, INPUTS[name][which], folder)
    if which == "good" and name not in ("cell", "delta", "ledger"):
        assert error is None, error
    if (
        (name, which) != ("ledger", "empty")
        and which in ("empty", "deep", "pickle", "traversal", "outside", "alias bomb")
    ) or which.startswith("2^60"):
        assert error is not None


@pytest.mark.parametrize("name", QUICK)
@settings(
    max_examples=12,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_varied_inputs_read_or_explain(name: str, tmp_path: Path, data: st.DataObject) -> None:
    content = bytearray(data.draw(st.sampled_from([v for v in INPUTS[name].values() if 0 < len(v) < 60_000])))
    for _ in range(data.draw(st.integers(1, 5))):
        at = data.draw(st.integers(0, max(len(content) - 1, 0)))
        change = data.draw(st.sampled_from(("set", "cut", "insert", "drop")))
        if change == "set" and content:
            content[at] = data.draw(st.integers(0, 255))
        elif change == "insert":
            content[at:at] = data.draw(st.binary(max_size=8))
        elif change == "drop":
            del content[at : at + data.draw(st.integers(1, 20))]
        else:
            del content[at:]
    read(name, bytes(content), tmp_path)
