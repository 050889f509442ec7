"""`nmke diff`: which facts two states hold differently; a state is a run, or `RUN~2`, two batches before its head."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from nmke.cli import options
from nmke.cli.console import fact, print_json, table
from nmke.cli.history import head_hash
from nmke.cli.opening import run_folder
from nmke.cli.probes import short
from nmke.errors import RequestError

if TYPE_CHECKING:
    from nmke.types import EditRequest

WIDTH = 60


@dataclass(frozen=True)
class State:
    """What a run held after some of its batches.

    Args:
        name: As it was asked for.
        base: Fingerprint of the base's weights.
        content_hash: Of the model in that state.
        facts: The fact that each edit wrote, by what was asked; later edits of the same fact win.
    """

    name: str
    base: str
    content_hash: str
    facts: dict[str, EditRequest]


def diff(
    first: Annotated[
        str, typer.Argument(metavar="A", help="Run folder, or RUN~N: N batches before its head.")
    ],
    second: Annotated[str, typer.Argument(metavar="B", help="The same for the other state.")],
    as_json: options.Json = False,
) -> None:
    """Show the facts that two states hold differently; no model is loaded."""
    a, b = read_state(first), read_state(second)
    rows = differences(a, b)
    if as_json:
        changes = [{"prompt": text, "a": old, "b": new} for text, old, new in rows]
        states = {name: {"state": s.name, "content_hash": s.content_hash} for name, s in (("a", a), ("b", b))}
        print_json(
            {"schema": "nmke.diff/1", **states, "same": a.content_hash == b.content_hash, "facts": changes}
        )
        return
    if rows:
        table(("prompt", first, second), [(short(t, WIDTH), old or "-", new or "-") for t, old, new in rows])
    fact("facts", f"{len(rows)} held differently ({len(a.facts)} in {first}, {len(b.facts)} in {second})")
    same = "the same model" if a.content_hash == b.content_hash else "different models"
    fact("hash", f"{a.content_hash[:12]} and {b.content_hash[:12]}: {same}")


def differences(a: State, b: State) -> list[tuple[str, str | None, str | None]]:
    """Prompt and answer in each state of every fact that they hold differently; None where one lacks it.

    Raises:
        RequestError: If their base models differ.
    """
    if a.base != b.base:
        raise RequestError(f"{a.name!r} and {b.name!r} edit different base models; compare runs on one base")
    return [
        (request.text, None if old is None else old.target_new, None if new is None else new.target_new)
        for key in {**a.facts, **b.facts}
        for old, new in [(a.facts.get(key), b.facts.get(key))]
        for request in [new or old]
        if request is not None and (old and old.target_new) != (new and new.target_new)
    ]


def read_state(name: str) -> State:
    """The state called RUN or RUN~N.

    Raises:
        RequestError: If it is no run, or has fewer batches.
    """
    from nmke.ledger import Ledger
    from nmke.run_folder import RunFolder

    run, mark, back = name.rpartition("~")
    if not mark or not back.isdecimal():
        run, back = name, "0"
    folder = RunFolder(run_folder(run))
    with closing(Ledger(folder.ledger)) as ledger:
        active, count = ledger.active(), int(back)
        if count > len(active):
            raise RequestError(
                f"{name!r} goes back {count} batches, the run holds {len(active)}: `nmke log` lists them"
            )
        kept = active[: len(active) - count]
        base = folder.base
        found = ledger.event(active[-count]).hash_before if count else head_hash(base, ledger.events())
        records = [record for seq in kept for record in ledger.event(seq).edits if record.status != "known"]
    facts = {record.request.fact_key: record.request for record in records}
    return State(name, base.fingerprint, found, facts)
