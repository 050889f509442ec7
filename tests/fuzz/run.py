"""Fuzz one reader without end, guided by coverage: `python -m tests.fuzz.run TARGET [libFuzzer options]`.

Needs atheris (`pip install 'nmke[fuzz]'`); `make fuzz` runs every target for some seconds. An input that breaks a
reader is left in `build/fuzz/`; put it into `nasty.py` when the reader is mended.
"""

import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["nmke"]):
    from tests.fuzz.targets import TARGETS, run_target

from tests.fuzz.nasty import every_input

MEGABYTES = 2_000  # torch and a tiny model take about half of it


def main() -> None:
    """Hand over to libFuzzer, which ends the process."""
    name, *options = sys.argv[1:]
    if name not in TARGETS:
        raise SystemExit(f"unknown target {name!r}; choose one of {', '.join(TARGETS)}")
    with tempfile.TemporaryDirectory(prefix="nmke-fuzz-") as folder:
        corpus, found = Path(folder, "corpus"), Path("build/fuzz")
        for place in (corpus, found):
            place.mkdir(parents=True, exist_ok=True)
        for number, content in enumerate(every_input()[name].values()):
            (corpus / str(number)).write_bytes(content)
        limits = [
            "-timeout=10",
            f"-rss_limit_mb={MEGABYTES}",
            "-max_len=20000",
            f"-artifact_prefix={found}/{name}-",
        ]
        atheris.Setup(
            [sys.argv[0], str(corpus), *limits, *options],
            lambda content: run_target(name, content, Path(folder)),
        )
        atheris.Fuzz()


if __name__ == "__main__":
    main()
