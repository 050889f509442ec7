"""Where facts lie: data sets beside the repository, and the facts that the package brings along."""

from __future__ import annotations

import os
from importlib.resources import as_file, files
from pathlib import Path

from nmke.facts.reader import read_facts
from nmke.models.cache import cache_dir
from nmke.types import EditRequest


def data_path(name: str) -> Path | None:
    """The file of a data set, or None when it is not on this machine.

    Args:
        name: File name, such as "counterfact.jsonl.gz".

    Returns:
        The first that exists: in `NMKE_DATA`, else in `../shared/data` seen from the repository or from
        the current folder, else where `nmke data get` puts files.
    """
    return next((folder / name for folder in _folders() if (folder / name).is_file()), None)


def downloads() -> Path:
    """The folder that `nmke data get` fills: `NMKE_DATA`, else one in the cache; it may not exist yet."""
    named = os.environ.get("NMKE_DATA")
    return Path(named).expanduser() if named else cache_dir() / "data"


def _folders() -> list[Path]:
    repository = Path(__file__).resolve().parents[3]
    beside = [root.parent / "shared" / "data" for root in (repository, Path.cwd())]
    named = os.environ.get("NMKE_DATA")
    return [*([Path(named).expanduser()] if named else []), *beside, cache_dir() / "data"]


def bundled_facts() -> tuple[EditRequest, ...]:
    """The facts written for this package, used by the demo and the tests."""
    with as_file(files("nmke") / "data" / "facts.jsonl") as path:
        return read_facts(path, shape="nmke").requests
