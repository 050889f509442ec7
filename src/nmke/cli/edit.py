"""`nmke edit`: write facts into a model, one batch after another, each saved before the next begins."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nmke.cli import options
from nmke.cli.batches import Outcome, edit_all
from nmke.cli.checkpoints import Checkpoints
from nmke.cli.console import print_json
from nmke.cli.edit_report import edit_json, print_edit
from nmke.cli.opening import Loading, editing, find_place, read_requests
from nmke.cli.settings import merge, takes_settings
from nmke.errors import HealthError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nmke.session import EditSession
    from nmke.types import EditRequest

INTERRUPTED = 130


@takes_settings()
def edit(
    source: options.Source,
    prompt: Annotated[
        str | None,
        typer.Option("-p", "--prompt", help="Prompt with its subject marked: 'The capital of {France} is'."),
    ] = None,
    target: Annotated[str | None, typer.Option("-t", "--target", help="The new answer.")] = None,
    subject: Annotated[
        str | None, typer.Option("-s", "--subject", help="The subject, where the prompt does not mark it.")
    ] = None,
    facts: Annotated[
        Path | None, typer.Option("-f", "--facts", help="File of facts: JSONL, JSON or CSV, gzip or not.")
    ] = None,
    limit: options.Limit = None,
    config: options.Config = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Run folder to make (default nmke-run-MODEL-TIME).")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an existing run; facts it holds are skipped.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Delete the run at --output first.")] = False,
    as_json: options.Json = False,
    strict: Annotated[bool, typer.Option("--strict", help="Exit 6 when an edit does not take.")] = False,
    no_eval: Annotated[bool, typer.Option("--no-eval", help="Do not score the facts afterwards.")] = False,
    eval_every: Annotated[
        int, typer.Option("--eval-every", min=0, help="Measure --eval-tasks every K edits; 0: never.")
    ] = 0,
    eval_tasks: Annotated[
        str, typer.Option("--eval-tasks", help="Tasks of `nmke eval --tasks`.")
    ] = "edits,wikitext",
    eval_limit: Annotated[
        int,
        typer.Option("--eval-limit", min=1, help="Questions of each task, windows of text, newest facts."),
    ] = 50,
    dtype: options.Dtype = "float32",
    device: options.Device = "auto",
    revision: options.Revision = None,
    settings: dict[str, Any] = {},  # noqa: B006 - filled by takes_settings, never changed
) -> None:
    """Edit facts; the source model is only read, everything goes to a run folder.

    One fact: nmke edit MODEL -p "The capital of {France} is" -t Lyon. Many: nmke edit MODEL --facts FILE.
    Settings: flags win over NMKE_* variables, these over --config, these over the run's own recipe.
    """
    checkpoints = Checkpoints.create(eval_every, eval_tasks, eval_limit)
    requests = read_requests(prompt, target, subject, facts, limit)
    place = find_place(source, output, resume=resume, force=force)
    given = merge(settings, config, place.recipe)
    with editing(place, given, Loading(dtype, device, revision), requests) as session:
        outcome = edit_all(session, requests, resume=resume, evaluate=not no_eval, checkpoints=checkpoints)
        if outcome.reports:
            session.folder.write_recipe(given)
        _show(session, requests, outcome, as_json=as_json)
    _leave(outcome, strict=strict)


def _leave(outcome: Outcome, *, strict: bool) -> None:
    """End with the exit code that the outcome calls for."""
    if outcome.interrupted:
        raise typer.Exit(INTERRUPTED)
    if outcome.collapsed is not None:
        raise outcome.collapsed
    failed = outcome.with_status("failed")
    if strict and failed:
        raise HealthError(
            f"{len(failed)} of {outcome.n_edits} edits did not take (first: {failed[0].request.id!r}); they are in "
            "the run: take them back with `nmke undo` and try other settings"
        )


def _show(session: EditSession, requests: Sequence[EditRequest], outcome: Outcome, *, as_json: bool) -> None:
    if as_json:
        print_json(edit_json(session, outcome))
    else:
        print_edit(session, requests, outcome)
