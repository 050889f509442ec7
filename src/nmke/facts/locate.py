"""Where facts lie: data sets beside the repository, and the facts that the package brings along."""

from __future__ import annotations

import os
from importlib.resources import as_file, files
from pathlib import Path

from nmke.facts.reader import read_facts
from nmke.types import EditRequest


def data_path(name: str) -> Path | None:
    """The file of a data set, or None when it is not on this machine.

    Args:
        name: File name, such as "counterfact.jsonl.gz".

    Returns:
        The first that exists: in `NMKE_DATA`, else in `../shared/data` seen from the repository or from
        the current folder.
    """
    named = os.environ.get("NMKE_DATA")
    repository = Path(__file__).resolve().parents[3]
    folders = [Path(named)] if named else []
    folders += [root.parent / "shared" / "data" for root in (repository, Path.cwd())]
    return next((folder / name for folder in folders if (folder / name).is_file()), None)


def bundled_facts() -> tuple[EditRequest, ...]:
    """The facts written for this package, used by the demo and the tests."""
    with as_file(files("nmke") / "data" / "facts.jsonl") as path:
        return read_facts(path, shape="nmke").requests
