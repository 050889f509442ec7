"""The back pages of a run's report: every setting, every fact, every event, and how to do it again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from nmke.config import EditConfig
from nmke.events import EditRecord
from nmke.viz.figures import Figure
from nmke.viz.report import Cell, Download, Section, Table
from nmke.viz.run_record import RunRecord, facts_jsonl
from nmke.viz.scales import counted

MOST_ROWS = 500
MOST_UNFOLDED = 12


def settings_section(run: RunRecord, figures: tuple[Figure, ...]) -> Section | None:
    """Every setting of the newest batch, those first that differ from the default."""
    if not run.config:
        return None
    defaults, changed = _defaults(), _changed(run)
    rows = tuple(
        (
            Cell(name, "code"),
            Cell(_value(value), "text" if name in changed else "quiet"),
            Cell(_value(defaults.get(name)), "quiet"),
            EditConfig.model_fields[name].description or "" if name in EditConfig.model_fields else "",
        )
        for name, value in run.config.items()
    )
    columns = ("setting", "value", "general default", "meaning")
    title = f"All {len(rows)} settings of the newest batch, the method's own defaults filled in"
    named = ", ".join(f"{name} {_value(value)}" for name, value in changed.items())
    text = f"Differs from the general default: {named or 'nothing'}."
    table = Table("settings", columns, rows, title, folded=True)
    return Section("settings", "Settings and cost", (text,), (table,), figures)


def facts_section(run: RunRecord) -> Section | None:
    """Every fact that the model holds."""
    if not run.held:
        return None
    rows = tuple(
        (
            record.request.id,
            record.request.text,
            record.request.target_true or "",
            record.request.target_new,
            Cell(_probabilities(record), "number"),
            Cell("took", "good") if record.status == "written" else Cell("did not take", "bad"),
        )
        for record in run.held[:MOST_ROWS]
    )
    columns = ("edit", "prompt", "answer before (as stated)", "new answer", "p(new)", "state")
    more = f", the first {MOST_ROWS}" if len(run.held) > MOST_ROWS else ""
    title = f"{counted(len(run.held), 'fact')} that the model holds now{more}"
    note = "p(new): probability of the whole new answer, before and right after the fact's own batch."
    table = Table("facts", columns, rows, title, note, folded=len(run.held) > MOST_UNFOLDED)
    return Section("facts", "The facts", tables=(table,))


def again_section(run: RunRecord) -> Section:
    """What the model is, by hashes and versions; what happened; the commands and files to do it again."""
    given = {record.request.id: record for batch in run.batches for record in batch.event.edits}
    files = (
        Download("facts.jsonl", facts_jsonl(tuple(given.values())), "application/jsonl"),
        Download("recipe.yaml", run.recipe or _recipe(run)),
    )
    text = (
        "On the same machine and versions the same facts, settings and seed give the same content hash; on others the "
        "scores agree within noise. `nmke verify` recomputes every hash of this run."
    )
    commands = (
        f"nmke edit {run.base.source} --facts facts.jsonl --config recipe.yaml -o again",
        f"nmke verify {run.name}",
        f"nmke report {run.name} --format json    # every number of this report",
    )
    return Section(
        "again",
        "Do it again",
        (text,),
        (_identity(run), _history(run)),
        commands=commands if run.batches else commands[1:],
        downloads=tuple(file for file in files if file.content),
    )


def _identity(run: RunRecord) -> Table:
    versions = run.batches[-1].event.body.get("versions", {}) if run.batches else {}
    rows = (
        ("base model", run.base.source + (f", revision {run.base.revision}" if run.base.revision else "")),
        ("base weights", Cell(run.base.fingerprint, "code")),
        ("edited model, content hash", Cell(run.content_hash, "code")),
        ("type of the weights", run.base.dtype),
        ("versions", ", ".join(f"{name} {version}" for name, version in versions.items())),
        ("contexts", "\n".join(repr(context) for context in run.contexts)),
    )
    return Table("identity", ("what", "value"), rows)


def _history(run: RunRecord) -> Table:
    rows = tuple(
        (
            event.id,
            event.created.replace("T", " ").removesuffix("+00:00"),
            event.kind,
            _what(event.kind, len(event.edits), event.body),
            Cell(f"{event.hash_before[:12]} → {event.hash_after[:12]}", "code"),
        )
        for event in run.events[-MOST_ROWS:]
    )
    columns = ("event", "time (UTC)", "kind", "what", "content hash")
    return Table("history", columns, rows, f"History: {counted(len(run.events), 'event')}", folded=True)


def _what(kind: str, edits: int, body: Mapping[str, Any]) -> str:
    if kind == "edit":
        return counted(edits, "fact")
    undone = len(body.get("undone", []))
    return f"{counted(undone, 'batch', 'batches')} taken back" + (
        f" for {body['reverted']}" if "reverted" in body else ""
    )


def _recipe(run: RunRecord) -> str:
    """The settings as a recipe, for runs that were made without one."""
    return yaml.safe_dump(_changed(run), sort_keys=False, allow_unicode=True) if run.config else ""


def _changed(run: RunRecord) -> dict[str, Any]:
    defaults = _defaults()
    return {name: value for name, value in run.config.items() if value != defaults.get(name)}


def _defaults() -> dict[str, Any]:
    return EditConfig.create().model_dump(mode="json")


def _probabilities(record: EditRecord) -> str:
    before, after = (record.detail.get(f"probability_{when}") for when in ("before", "after"))
    return f"{'?' if before is None else f'{before:.2f}'} → {'?' if after is None else f'{after:.2f}'}"


def _value(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
