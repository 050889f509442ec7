"""Scores kept beside a run: one small JSON file for each time that a state was scored on a list of facts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from nmke.damage import load_json
from nmke.errors import LedgerError
from nmke.evaluation.base_outputs import facts_hash
from nmke.evaluation.score_table import ScoreTable
from nmke.models.cache import atomic_file
from nmke.types import EditRequest

SCHEMA = "nmke.scores/1"
FOLDER = "scores"


@dataclass(frozen=True)
class ScoreRecord:
    """Scores of one state on one list of facts.

    Args:
        content_hash: Of the edited model that was scored.
        facts: `facts_hash` of the requests.
        n_facts: How many.
        created: UTC time.
        protocols: As `ScoreTable.to_json` gives them: by protocol means, n, intervals, counts.
    """

    content_hash: str
    facts: str
    n_facts: int
    created: str
    protocols: dict[str, dict[str, Any]]


def save_scores(
    root: Path, content_hash: str, requests: Sequence[EditRequest], table: ScoreTable
) -> ScoreRecord:
    """Keep the scores under `root`; the same state, facts and protocols replace what was there.

    Raises:
        OSError: If the folder cannot be written.
    """
    created = datetime.now(timezone.utc).isoformat(timespec="seconds")
    record = ScoreRecord(content_hash, facts_hash(requests), len(requests), created, table.to_json())
    names = "-".join(sorted(record.protocols))
    path = root / FOLDER / f"{content_hash[:16]}-{record.facts[:16]}-{names}.json"
    path.parent.mkdir(exist_ok=True)
    with atomic_file(path) as temporary:
        text = json.dumps({"schema": SCHEMA, **vars(record)}, indent=1, ensure_ascii=False)
        temporary.write_text(text + "\n", encoding="utf-8")
    return record


def read_scores(root: Path) -> list[ScoreRecord]:
    """Every record under `root`, oldest first.

    Raises:
        LedgerError: If one is damaged or of another schema.
    """
    found = []
    for path in sorted((root / FOLDER).glob("*.json")):
        try:
            content = load_json(path.read_text(encoding="utf-8"))
            if content.pop("schema") != SCHEMA:
                raise ValueError(f"not of schema {SCHEMA!r}")
            found.append(ScoreRecord(**content))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise LedgerError(
                f"score record {str(path)!r} cannot be used ({error}); remove it and score again with `nmke eval`"
            ) from error
    return sorted(found, key=lambda record: record.created)
