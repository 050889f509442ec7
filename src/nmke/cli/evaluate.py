"""`nmke eval`: score a run as it is loaded from disk, or a model that was never edited."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nmke.cli import options
from nmke.cli.console import fact, note, print_json
from nmke.cli.opening import Loading, check_requests, is_run, load, open_run, read_file
from nmke.cli.scoring import facts_label, print_scores, score_session
from nmke.errors import ConfigError, unknown_name

if TYPE_CHECKING:
    from nmke.evaluation.score_table import ScoreTable
    from nmke.models.load import EditableModel
    from nmke.types import EditRequest

ALL = "all"
PROTOCOL_NAMES = ("teacher_forced", "likelihood", "generation")


def evaluate(
    source: Annotated[str, typer.Argument(metavar="RUN", help="Run folder, or a model.")],
    facts: Annotated[
        Path | None, typer.Option("-f", "--facts", help="Facts to score (default: those that the run holds).")
    ] = None,
    protocol: Annotated[
        str,
        typer.Option("--protocol", help="teacher_forced, likelihood, generation, several with commas, all."),
    ] = "teacher_forced",
    limit: options.Limit = None,
    as_json: options.Json = False,
    dtype: options.Dtype = "float32",
    device: options.Device = "auto",
) -> None:
    """Score facts under named protocols; locality is measured against the unedited model."""
    protocols = read_protocols(protocol)
    requests = read_file(facts, limit) if facts is not None else None
    if is_run(source):
        found = _score_run(source, requests, limit, protocols, device)
    else:
        if requests is None:
            raise ConfigError(
                f"{source!r} is no run folder, so there are no facts to take from it; give --facts"
            )
        found = _score_model(load(source, Loading(dtype, device)), requests, protocols)
    table, about = found
    about = {"schema": "nmke.eval/1", "facts": None if facts is None else str(facts), **about}
    if as_json:
        print_json({**about, "protocols": table.to_json()})
        return
    fact("scored", f"{source}   content hash {about['content_hash'][:12]}")
    fact("facts", facts_label(facts, len(table.rows)))
    print_scores(table)


def read_protocols(text: str) -> tuple[str, ...]:
    """Protocol names out of the flag.

    Raises:
        ConfigError: If one is unknown; names the nearest.
    """
    names = [name.strip().replace("-", "_") for name in text.split(",") if name.strip()]
    if ALL in names:
        return PROTOCOL_NAMES
    for name in names or [text]:
        if name not in PROTOCOL_NAMES:
            raise ConfigError(unknown_name("protocol", name, (*PROTOCOL_NAMES, ALL)))
    return tuple(names)


def _score_run(
    source: str,
    requests: Sequence[EditRequest] | None,
    limit: int | None,
    protocols: Sequence[str],
    device: str,
) -> tuple[ScoreTable, dict[str, Any]]:
    with closing(open_run(Path(source), device)) as session:
        chosen = session.active_requests()[:limit] if requests is None else list(requests)
        if not chosen:
            raise ConfigError(f"run {source!r} holds no facts; name some with --facts")
        check_requests(session.model, chosen)
        table = score_session(session, chosen, protocols)
        about = {
            "run": source,
            "model": session.model.source,
            "content_hash": session.content_hash,
            "n_facts": len(chosen),
        }
        return table, about


def _score_model(
    model: EditableModel, requests: Sequence[EditRequest], protocols: Sequence[str]
) -> tuple[ScoreTable, dict[str, Any]]:
    import hashlib

    from nmke.evaluation.base_outputs import collect_base
    from nmke.evaluation.protocols import score

    note("a model without a run: locality is measured against itself and is 1")
    check_requests(model, requests)
    table = score(model, requests, collect_base(model, requests), protocols)
    content_hash = hashlib.sha256(model.fingerprint.encode()).hexdigest()
    return table, {
        "run": None,
        "model": model.source,
        "content_hash": content_hash,
        "n_facts": len(requests),
    }
