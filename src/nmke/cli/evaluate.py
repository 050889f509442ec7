"""`nmke eval`: score a run as it is loaded from disk, or a model that was never edited."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nmke.cli import options
from nmke.cli.console import fact, note, print_json, progress, working
from nmke.cli.opening import Loading, is_run, load, open_run, read_cases
from nmke.cli.scoring import base_outputs, facts_label, print_scores, print_tasks, score_session
from nmke.errors import ConfigError, unknown_name

if TYPE_CHECKING:
    from nmke.evaluation.score_table import ScoreTable
    from nmke.evaluation.tasks import Comparison
    from nmke.models.load import EditableModel
    from nmke.session import EditSession
    from nmke.types import EditCase

ALL = "all"
PROTOCOL_NAMES = ("teacher_forced", "likelihood", "generation")
LAST, AT_EDIT, BOTH = "last", "at-edit", "both"
EDITS = "edits"


@dataclass(frozen=True)
class Asked:
    """What the command line asks for.

    Args:
        protocols: Names out of `PROTOCOL_NAMES`.
        tasks: "edits" and names of other tasks.
        when: "last", "at-edit" or "both".
        limit: Facts and questions at most.
        seed: Of draws and intervals.
    """

    protocols: tuple[str, ...]
    tasks: tuple[str, ...]
    when: str
    limit: int | None
    seed: int


@dataclass
class Found:
    """What was scored."""

    about: dict[str, Any]
    last: ScoreTable | None = None
    at_edit: ScoreTable | None = None
    tasks: dict[str, Comparison] = field(default_factory=dict)


def evaluate(
    source: Annotated[str, typer.Argument(metavar="RUN", help="Run folder, or a model.")],
    facts: Annotated[
        Path | None,
        typer.Option(
            "-f", "--facts", help="Facts to score: a file, or a benchmark's name (default: the run's own)."
        ),
    ] = None,
    protocol: Annotated[
        str,
        typer.Option("--protocol", help="teacher_forced, likelihood, generation, several with commas, all."),
    ] = "teacher_forced",
    tasks: Annotated[
        str,
        typer.Option(
            "--tasks",
            help="edits, general (all of general ability), fluency, wikitext, mmlu, lambada ...; several with commas.",
        ),
    ] = EDITS,
    when: Annotated[
        str,
        typer.Option(
            "--when", help="Score edits after the last one (last), after their own (at-edit), both."
        ),
    ] = LAST,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Only the first N facts, and N questions of every other task.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of drawn questions and of the intervals.")] = 0,
    as_json: options.Json = False,
    dtype: options.Dtype = "float32",
    device: options.Device = "auto",
) -> None:
    """Score facts under named protocols, and general ability, against the unedited model."""
    from nmke.evaluation.tasks import read_tasks

    asked = Asked(read_protocols(protocol), read_tasks(tasks), _read_when(when), limit, seed)
    cases = read_cases(facts, limit) if facts is not None else None
    if is_run(source):
        found = _score_run(source, cases, asked, device)
    else:
        if asked.when != LAST:
            raise ConfigError(
                f"{source!r} is no run folder, so it has no batches to score after; leave out --when"
            )
        if cases is None and {EDITS, "fluency"} & set(asked.tasks):
            raise ConfigError(
                f"{source!r} is no run folder, so there are no facts to take from it; give --facts, "
                "or --tasks without edits"
            )
        found = _score_model(load(source, Loading(dtype, device)), cases or [], asked)
    found.about = {"schema": "nmke.eval/1", "facts": None if facts is None else str(facts), **found.about}
    if as_json:
        print_json(_as_json(found, asked))
    else:
        _print(source, facts, found)


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


def _read_when(text: str) -> str:
    found = text.strip().replace("_", "-")
    if found not in (LAST, AT_EDIT, BOTH):
        raise ConfigError(unknown_name("time of scoring", text, (LAST, AT_EDIT, BOTH)))
    return found


def _score_run(source: str, cases: Sequence[EditCase] | None, asked: Asked, device: str) -> Found:
    from nmke.readable import check_requests
    from nmke.types import EditCase

    with closing(open_run(Path(source), device)) as session:
        if cases is None:
            cases = [EditCase((request,)) for request in session.active_requests()[: asked.limit]]
        if not cases and {EDITS, "fluency"} & set(asked.tasks):
            raise ConfigError(f"run {source!r} holds no facts; name some with --facts")
        check_requests(session.model, [request for case in cases for request in case.final_requests])
        about = {
            "run": source,
            "model": session.model.source,
            "content_hash": session.content_hash,
            "n_facts": sum(len(case.final_requests) for case in cases),
        }
        found = Found(about)
        if EDITS in asked.tasks:
            _score_edits(session, cases, asked, found)
        for name in asked.tasks:
            if name != EDITS:
                found.tasks[name] = compare_task(session, name, cases, asked.limit, asked.seed)
        return found


def _score_edits(session: EditSession, cases: Sequence[EditCase], asked: Asked, found: Found) -> None:
    from nmke.evaluation.at_edit import score_at_edit

    if asked.when != AT_EDIT:
        found.last = score_session(session, cases, asked.protocols, seed=asked.seed)
    if asked.when != LAST:
        base = base_outputs(session, [request for case in cases for request in case.final_requests])
        found.at_edit = score_at_edit(
            session, cases, base, asked.protocols, progress=progress(), seed=asked.seed
        )


def compare_task(
    session: EditSession, name: str, cases: Sequence[EditCase], limit: int | None, seed: int = 0
) -> Comparison:
    """One task before and after, with a word on stderr."""
    from nmke.evaluation.tasks import compare

    with working(f"measuring {name}, before and after"):
        return compare(session, name, cases, limit=limit, seed=seed)


def _score_model(model: EditableModel, cases: Sequence[EditCase], asked: Asked) -> Found:
    from nmke.evaluation.base_outputs import collect_base
    from nmke.evaluation.portability import score_cases
    from nmke.evaluation.tasks import measure_model
    from nmke.readable import check_requests

    requests = [request for case in cases for request in case.final_requests]
    content_hash = hashlib.sha256(model.fingerprint.encode()).hexdigest()
    about = {"run": None, "model": model.source, "content_hash": content_hash, "n_facts": len(requests)}
    found = Found(about)
    check_requests(model, requests)
    if EDITS in asked.tasks:
        note("a model without a run: locality is measured against itself and is 1")
        found.last = score_cases(
            model, cases, collect_base(model, requests), asked.protocols, seed=asked.seed
        )
    for name in asked.tasks:
        if name != EDITS:
            with working(f"measuring {name}"):
                found.tasks[name] = measure_model(model, name, cases, limit=asked.limit, seed=asked.seed)
    return found


def _as_json(found: Found, asked: Asked) -> dict[str, Any]:
    content = {**found.about, "seed": asked.seed, "protocols": found.last.to_json() if found.last else {}}
    if found.at_edit:
        content["protocols_at_edit"] = found.at_edit.to_json()
    if found.tasks:
        content["tasks"] = {name: compared.to_json() for name, compared in found.tasks.items()}
    return content


def _print(source: str, facts: Path | None, found: Found) -> None:
    fact("scored", f"{source}   content hash {found.about['content_hash'][:12]}")
    last = "after the last edit" if found.about["run"] else "asked of the model as it is"
    for table, when in ((found.at_edit, "right after each batch"), (found.last, last)):
        if table is not None:
            fact("facts", f"{facts_label(facts, len(table.rows))}, {when}")
            print_scores(table)
    if found.tasks:
        print_tasks(found.tasks)
