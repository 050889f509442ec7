"""What a report needs the model for: its words before and after, and how far its weights moved; cached in the run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nmke.cli.console import working
from nmke.cli.probes import Answer, Probe, answers, choose_probes, probes_json
from nmke.damage import load_json, reason
from nmke.errors import LedgerError

if TYPE_CHECKING:
    from nmke.session import EditSession

SCHEMA = "nmke.report_data/1"
FOLDER = "report-data"
SPECTRUM_POINTS = 96
COLUMNS_SHOWN = 240


@dataclass(frozen=True)
class Measured:
    """What was read off the model in one state.

    Args:
        content_hash: The state.
        texts: As in `nmke edit --json`: probes with answers before and after.
        facts: Out of how many facts at most the probes were chosen.
        stability: Per edited layer its distance from the base; the columns of the layer that moved most.
    """

    content_hash: str
    texts: Sequence[Mapping[str, Any]] = ()
    facts: int = 0
    stability: Mapping[str, Any] = field(default_factory=dict)

    def answers_for(self, facts: int) -> bool:
        """Whether it holds the words about so many facts."""
        return self.facts == facts


def cached(root: Path, content_hash: str) -> Measured | None:
    """What was measured earlier in that state, None when nothing was.

    Raises:
        LedgerError: If the file is damaged.
    """
    path = _path(root, content_hash)
    if not path.is_file():
        return None
    try:
        content = load_json(path.read_text(encoding="utf-8"))
        if content.pop("schema") != SCHEMA:
            raise ValueError(f"not of schema {SCHEMA!r}")
        return Measured(**content)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise LedgerError(
            f"{str(path)!r} cannot be used ({reason(error)}); remove it, and the report measures again"
        ) from error


def measure(
    session: EditSession,
    facts: int,
    said: tuple[Sequence[Probe], Sequence[Answer], Sequence[Answer]] | None = None,
) -> Measured:
    """Ask the edited and the unedited model, and compare their weights; the result is kept in the run.

    Args:
        session: The run, open.
        facts: Words about at most so many facts, spread over those that the run holds.
        said: Probes with answers before and after, when they are known already.
    """
    texts = probes_json(*(said or _asked(session, facts)))
    with working("comparing the edited layers with the base"):
        stability = measure_stability(session)
    found = Measured(session.content_hash, texts, facts, stability)
    _save(session.folder.root, found)
    return found


def measure_stability(session: EditSession) -> dict[str, Any]:
    """Every edited matrix against its base, in numbers that JSON holds: "4" is layer 4's down-projection."""
    from nmke.stability import compare, project_columns
    from nmke.types import MatrixPlace

    layers: dict[str, Any] = {}
    for changed in session.changed():
        numbers = compare(*session.weights.before_and_after(changed.place)).as_json()
        for name in ("singular_before", "singular_after"):
            numbers[name] = thinned(numbers[name])
        layers[changed.place.label] = numbers
    written = [changed.layer for changed in session.changed() if changed.part == "down"]
    if not written:
        return {"layers": layers, "projection": None}
    farthest = max(written, key=lambda layer: float(layers[str(layer)]["relative_norm"]))
    before_and_after = session.weights.before_and_after(MatrixPlace(farthest))
    shown = project_columns(*before_and_after, shown=COLUMNS_SHOWN)
    projection = {
        "layer": farthest,
        "columns": layers[str(farthest)]["columns"],
        "farthest": min(COLUMNS_SHOWN, layers[str(farthest)]["columns"]) // 4,
        "index": shown.index.tolist(),
        "before": shown.before.tolist(),
        "after": shown.after.tolist(),
        "explained": list(shown.explained),
    }
    return {"layers": layers, "projection": projection}


def thinned(values: Sequence[float], most: int = SPECTRUM_POINTS) -> dict[str, Any]:
    """A long list of singular values as every n-th of them."""
    every = max(1, -(-len(values) // most))
    return {"every": every, "values": list(values[::every])}


def _asked(session: EditSession, facts: int) -> tuple[list[Probe], list[Answer], list[Answer]]:
    requests = session.active_requests()
    probes = choose_probes(requests, facts) if requests else []
    with working(f"asking the edited and the unedited model {len(probes)} prompts"):
        after = answers(session.model, probes)
        with session.base():
            before = answers(session.model, probes)
    return probes, before, after


def _save(root: Path, found: Measured) -> None:
    """Keep it; a run on a read-only disk goes without."""
    import contextlib

    from nmke.models.cache import atomic_file

    with contextlib.suppress(OSError), atomic_file(_path(root, found.content_hash)) as temporary:
        text = json.dumps({"schema": SCHEMA, **vars(found)}, ensure_ascii=False)
        temporary.write_text(text + "\n", encoding="utf-8")


def _path(root: Path, content_hash: str) -> Path:
    return root / FOLDER / f"{content_hash[:24]}.json"
