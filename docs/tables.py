"""Fills the tables of the documentation from the code, so that they cannot drift apart.

A page holds a comment such as `<!-- table: settings -->`; mkdocs calls `on_page_markdown`.
"""

from __future__ import annotations

import json
import re
import typing
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nmke import errors
from nmke.config import EditConfig

ROOT = Path(__file__).parents[1]
SCORES = ("reliability", "generalization", "locality")
MARK = re.compile(r"<!-- table: ([a-z-]+) -->")
NUMBER = re.compile(r"(\*\*)?[+-]?[\d.]|-$|$")  # or nothing there


def on_page_markdown(markdown: str, **_: Any) -> str:
    """The page with every marked table filled in."""
    return MARK.sub(lambda match: TABLES[match.group(1)](), markdown)


def _settings() -> str:
    rows = [
        (f"`{name}`", _type(field.annotation), f"`{field.default}`", field.description or "")
        for name, field in EditConfig.model_fields.items()
    ]
    return _table(("setting", "values", "default", "meaning"), rows)


def _methods() -> str:
    from nmke.editors import methods

    rows = []
    for name in methods.names():
        entry = methods.entry(name)
        own = ", ".join(f"`{key}={value}`" for key, value in entry.value.defaults.items())
        rows.append((f"`{name}`", entry.summary, own, entry.source))
    return _table(("method", "what it does", "its own defaults", "source"), rows)


def _sources() -> str:
    from nmke.editors import methods

    rows = [(f"`{e.name}`", e.summary, e.source, ", ".join(e.needs) or "nothing") for e in methods]
    return _table(("method", "what it does", "source", "needs"), rows)


def _deviations() -> str:
    from nmke.editors import methods, stabilisers

    seen: dict[str, list[str]] = {}
    for entry in (*methods, *stabilisers):
        names = seen.setdefault(entry.differs, [])
        names += [] if entry.name in names else [entry.name]
    rows = [(", ".join(f"`{name}`" for name in names), text) for text, names in seen.items() if text]
    return _table(("method or stabiliser", "deviations"), rows)


def _stabilisers() -> str:
    from nmke.editors import stabilisers

    rows = [(f"`{entry.name}`", entry.summary, entry.source) for entry in stabilisers]
    return _table(("stabiliser", "what it does", "source"), rows)


def _scores() -> str:
    from nmke.attribution import neuron_scores

    entries = [neuron_scores.entry(name) for name in neuron_scores.names()]
    rows = [(f"`{entry.name}`", entry.summary, entry.source) for entry in entries]
    return _table(("attribution", "what it measures", "source"), rows)


def _builtins() -> str:
    from nmke.models.builtin import BUILTIN_MODELS

    rows = [
        (f"`{model.name}`", model.title, ", ".join(f"`{wheel.requirement}`" for wheel in model.wheels))
        for model in BUILTIN_MODELS.values()
    ]
    return _table(("name", "model", "comes from"), rows)


def _errors() -> str:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    rows = [
        (f"`{kind.__name__}`", str(kind.exit_code), (kind.__doc__ or "").strip())
        for kind in kinds
        if issubclass(kind, errors.NmkeError)
    ]
    return _table(("error", "exit code", "raised when"), rows)


def _plan() -> str:
    from nmke.bench.plan import Plan

    rows = [
        (
            f"`{name}`",
            "" if field.is_required() else f"`{_plain(field.get_default(call_default_factory=True))}`",
            field.description or "",
        )
        for name, field in Plan.model_fields.items()
    ]
    return _table(("field", "default", "meaning"), rows)


def _plain(value: Any) -> str:
    """A default as it is written in YAML."""
    words = {None: "null", True: "true", False: "false"}
    if isinstance(value, tuple):
        return f"[{', '.join(map(str, value))}]"
    return words[value] if value is None or isinstance(value, bool) else str(value)


def _benchmarks() -> str:
    from nmke.evaluation.benchmarks import benchmarks

    rows = [(f"`{e.name}`", e.summary, e.value.asks, e.source) for e in benchmarks]
    return _table(("name", "what is edited", "what is asked besides", "source"), rows)


def _tasks() -> str:
    from nmke.evaluation.ability import ability_tasks

    rows = [
        (f"`{e.name}`", e.value.title, e.summary, _chance(e.value.chance), e.source) for e in ability_tasks
    ]
    return _table(("name", "data", "how", "chance", "source"), rows)


def _ability() -> str:
    """The committed record of the unedited models, one column a model."""
    cells = _cells("general_ability")
    names = list(dict.fromkeys(task for tasks in cells.values() for task in tasks))
    rows = [
        (
            f"`{task}`",
            _metric(cells, task),
            *(_measured(cells[model].get(task)) for model in cells),
            _chance(next(tasks[task]["chance"] for tasks in cells.values() if task in tasks)),
        )
        for task in names
    ]
    return _table(("task", "metric", *cells, "chance"), rows)


def _fifty() -> str:
    """The committed record of fifty edits in batches of ten."""
    rows = []
    for name, cell in _cells("speed_quality").items():
        shares = [cell.get(key) for key in ("neurons_kept_per_edit", "neurons_kept")]
        written = " / ".join("all" if share is None else f"{share:.0%}" for share in shares)
        if name in ("nmke", "nmke, random neurons"):
            written = "one / one for each edit"
        elif name.startswith("nmke") and shares[0] is None and shares[1] is not None:
            written = f"one mask / {shares[1]:.0%}"
        cost = (f"{cell['seconds_per_edit']:.1f}", f"{cell['machine']['load_average'][0]:.1f}")
        rows.append((name, written, *_scored(cell["scores"]), *cost, f"{cell['peak_rss_mb']:.0f}"))
    header = ("method", "neurons per edit / batch", *SCORES, "s per edit", "load", "peak MB")
    return _table(header, rows)


def _masks() -> str:
    """The committed record of one set of targets under different masks."""
    rows = [
        (
            name,
            "all" if cell["share"] is None else f"{cell['share']:.0%}",
            *_scored(cell["scores"]),
            f"{cell['perplexity']:.2f}",
        )
        for name, cell in _cells("research_edit_masks").items()
    ]
    return _table(("mask", "neurons", *SCORES, "perplexity"), rows)


def _own() -> str:
    """The committed record of neurons of their own beside solves in the down-projections."""
    rows = [
        (name, *_scored(cell["scores"]), f"{cell['perplexity']:.2f}")
        for name, cell in _cells("research_own_neurons").items()
    ]
    return _table(("where it is written", *SCORES, "perplexity"), rows)


def _readings() -> str:
    """The committed record of for whom neurons of their own fire."""
    columns = {
        "strong_at_paraphrases": "fires at paraphrases",
        "paraphrases_hit": "another's fires there",
        "neighbours_hit": "fires at neighbours",
        "other_subjects_hit": "fires at other subjects",
    }
    rows = [
        (
            name,
            f"{cell['own']['lowest']:.2f}",
            *(_share(cell[key]) for key in columns),
            _interval(cell["later_neurons"]),
        )
        for name, cell in _cells("research_own_readings").items()
    ]
    return _table(
        ("readings", "lowest share, own contexts", *columns.values(), "later neurons per subject"), rows
    )


def _same_subject() -> str:
    """The committed record of two facts about each subject."""
    rows = [
        (name, which, *(_interval(cell[which][metric]) for metric in SCORES))
        for name, cell in _cells("research_same_subject").items()
        for which in ("first", "second")
    ]
    return _table(("targets", "facts", *SCORES), rows)


def _streams() -> str:
    """The committed record of long streams."""
    header = ("edits", "method", "scored", *SCORES, "mean", "perplexity")
    rows: dict[str, list[tuple[str, ...]]] = {}
    for stream, where, point in _stream_points():
        if "reliability" in point:
            scores = (_interval(point[metric]) for metric in (*SCORES, "mean"))
            found = (*where, str(point["mean"]["n"]), *scores, f"{point['perplexity']:.2f}")
            rows.setdefault(stream, []).append(found)
    return _tables(header, rows)


def _paired() -> str:
    """The paired differences in the record of long streams."""
    rows: dict[str, list[tuple[str, ...]]] = {}
    for stream, where, point in _stream_points():
        if found := point.get("reference_minus_this"):
            *single, mean = (_difference(found[metric]) for metric in (*SCORES, "mean"))
            sure = found["mean"]["low"] > 0 or found["mean"]["high"] < 0
            names = (where[0], point["reference"], where[1])
            rows.setdefault(stream, []).append((*names, *single, f"**{mean}**" if sure else mean))
    return _tables(("edits", "method", "against", *SCORES, "mean"), rows)


def _tables(header: tuple[str, ...], rows: dict[str, list[tuple[str, ...]]]) -> str:
    """One table under each name."""
    return "\n\n".join(f"*{name}*\n\n{_table(header, each)}" for name, each in rows.items())


def _silencing() -> str:
    """The committed record of silenced neurons."""
    rows = []
    for model, layers in _record("research_silencing")["models"].items():
        unedited = layers["unedited"]["perplexity"]
        rows.append((model, "", "none", "1", "1", f"{unedited:.2f}"))
        for layer, cells in layers.items():
            for cell, found in cells.items() if layer != "unedited" else ():
                kept = [
                    _interval(found["locality"][data]) if data in found["locality"] else "-"
                    for data in ("counterfact", "zsre")
                ]
                rows.append((model, layer, cell, *kept, f"{found['perplexity']:.2f}"))
    return _table(("model", "layer", "silenced", "CounterFact locality", "ZsRE locality", "perplexity"), rows)


def _elsewhere() -> str:
    """What streams of edits did to general ability, task by task."""
    rows: dict[str, list[tuple[str, ...]]] = {}
    for stream, methods in _record("research_ability")["streams"].items():
        for method, cell in methods.items():
            for task, found in cell["tasks"].items():
                apart = found.get("reference_minus_this")
                scores = (_interval(found["before"]), _interval(found["after"]), _difference(found["change"]))
                row = (f"`{task}`", f"`{method}`", *scores, _difference(apart) if apart else "-")
                rows.setdefault(f"{stream}, {cell['edits']} edits", []).append(row)
    header = ("task", "method", "unedited", "edited", "change", "`nmke` minus this")
    return _tables(header, {stream: sorted(each) for stream, each in rows.items()})


def _stream_points() -> Iterator[tuple[str, tuple[str, str], dict[str, Any]]]:
    """Every checkpoint of the record: the stream, edits and method, what was found."""
    found = [
        ((setup["model"], setup["data"], setup["batch"], int(edits), name), point)
        for name, cells in _cells("research_streams").items()
        for cell in cells
        for setup in (cell["setup"],)
        for edits, point in cell["points"].items()
    ]
    for (model, data, batch, edits, name), point in sorted(found, key=lambda each: each[0]):
        yield f"{model}, {data}, batches of {batch}", (f"{edits:,}", f"`{name}`"), point


def _difference(estimate: dict[str, float]) -> str:
    return f"{estimate['mean']:+.3f} ({estimate['low']:+.3f} to {estimate['high']:+.3f})"


def _corpus() -> str:
    """The committed record of two kinds of text for key statistics."""
    cells: Any = _cells("corpus")
    rows = [
        (c["corpus"], f"{c['tokens']:,}", c["method"], *_scored(c["scores"]), f"{c['perplexity']:.2f}")
        for c in cells
    ]
    return _table(("text", "tokens", "method", *SCORES, "perplexity"), rows)


def _quick() -> str:
    """The committed quick look at every method: ten facts in one batch."""
    rows = [
        (f"`{name}`", *_scored(row["scores"]), f"{row['seconds_per_edit']:.1f}")
        for name, row in sorted(_record("baselines_smoke")["rows"].items())
    ]
    return _table(("method", *SCORES, "s per edit (busy machine)"), rows)


def _leaderboard() -> str:
    """The last checkpoint of every committed cell of the leaderboard; a sentence while there is none."""
    from nmke.bench.table import make_table, markdown

    cells = _board()
    return markdown(make_table(cells)) if cells else "No cell of the leaderboard is committed yet."


def _board_paired() -> str:
    """Every method of the leaderboard against `nmke`, fact by fact; the nearest first."""
    from nmke.bench.compare import compare
    from nmke.bench.groups import MEAN, named_seeds

    cells = _board()
    labels = {cell.identity.label for cell in cells}
    rows: dict[str, list[tuple[float, tuple[str, ...]]]] = {}
    for label in sorted(labels - {"nmke"}) if "nmke" in labels else ():
        for found in compare(cells, "nmke", label):
            one = {
                d.metric: asdict(d.difference) for d in found.differences if d.protocol == "teacher_forced"
            }
            *single, mean = (_difference(one[metric]) if metric in one else "-" for metric in (*SCORES, MEAN))
            sure = MEAN in one and not one[MEAN]["low"] <= 0 <= one[MEAN]["high"]
            size = f"batches of {found.a.batch_size}, {named_seeds(found.a.seeds)}"
            stream = f"{found.a.dataset}, {found.n_edits} edits, {size}"
            row = (f"`{label}`", *single, f"**{mean}**" if sure else mean)
            rows.setdefault(stream, []).append((one[MEAN]["mean"] if MEAN in one else 1.0, row))
    ranked = {stream: [row for _, row in sorted(rows[stream])] for stream in sorted(rows)}
    return _tables(("`nmke` minus", *SCORES, "mean"), ranked)


def _board() -> list[Any]:
    """The committed cells that reached a checkpoint."""
    from nmke.bench.record import read_cells

    folder = ROOT / "benchmarks" / "leaderboard"
    return [cell for cell in read_cells(folder) if cell.last] if (folder / "cells").is_dir() else []


def _compatibility() -> str:
    """The committed record of every family of transformers, by what came of it."""
    if not (ROOT / "benchmarks" / "results" / "compatibility.json").is_file():
        return "No record is committed yet; the command above makes one."
    kinds: dict[str, list[str]] = {}
    for family, cell in _cells("compatibility").items():
        what = {"unbuilt": "not buildable where this was tried"}.get(
            cell["outcome"], f"{cell['outcome']}: {cell.get('kind', cell.get('reason', ''))}"
        )
        if cell["outcome"] == "edited":
            whole = cell["default"]["method"] == "nmke"
            what = f"edited and undone; by default {'a neuron for every fact' if whole else '`nmke-linear`'}"
        kinds.setdefault(what, []).append(family)
    ordered = sorted(kinds.items(), key=lambda item: (not item[0].startswith("edited"), -len(item[1])))
    rows = [(what, str(len(names)), ", ".join(f"`{name}`" for name in names)) for what, names in ordered]
    return _table(("what came of it", "families", "model types"), rows)


def _record(name: str) -> dict[str, Any]:
    path = ROOT / "benchmarks" / "results" / f"{name}.json"
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _cells(record: str) -> dict[str, Any]:
    cells: dict[str, Any] = _record(record)["cells"]
    return cells


def _scored(scores: dict[str, Any]) -> tuple[str, ...]:
    scores = scores.get("teacher_forced", scores)
    return tuple(
        f"{scores[name]:.3f} [{scores['intervals'][name][0]:.2f}, {scores['intervals'][name][1]:.2f}]"
        for name in SCORES
    )


def _metric(cells: dict[str, Any], task: str) -> str:
    return next(iter(next(tasks[task]["intervals"] for tasks in cells.values() if task in tasks)))


def _measured(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return "-"
    name, (low, high) = next(iter(cell["intervals"].items()))
    return f"{cell[name]:.3g} [{low:.3g}, {high:.3g}], n = {cell['n']}"


def _interval(estimate: dict[str, float]) -> str:
    return f"{estimate['mean']:.3f} [{estimate['low']:.2f}, {estimate['high']:.2f}]"


def _share(estimate: dict[str, float]) -> str:
    return f"{estimate['mean']:.1%} [{estimate['low']:.1%}, {estimate['high']:.1%}]"


def _chance(chance: float | None) -> str:
    return "-" if chance is None else f"{chance:.2f}"


def _type(annotation: Any) -> str:
    """Values that a setting takes, in words."""
    if typing.get_origin(annotation) is typing.Literal:
        return ", ".join(f"`{value}`" for value in typing.get_args(annotation))
    inner = [part for part in typing.get_args(annotation) if part is not type(None)]
    if typing.get_origin(annotation) is tuple:
        return "list of integers" if int in typing.get_args(annotation) else "list of names"
    if typing.get_origin(annotation) is typing.Annotated:
        return _type(inner[0])
    if inner:
        return ", ".join(_type(part) for part in inner)
    words = {"str": "text", "int": "integer", "float": "number"}
    name = getattr(annotation, "__name__", str(annotation))
    return words.get(name, name)


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """In Markdown; columns of numbers are set right, and do not break (`extra.css`)."""
    columns = zip(*rows, strict=True) if rows else [()] * len(header)
    rules = ["---:" if cells and all(map(NUMBER.match, cells)) else "---" for cells in columns]
    lines = [header, rules, *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in lines)


TABLES = {
    "settings": _settings,
    "methods": _methods,
    "sources": _sources,
    "deviations": _deviations,
    "stabilisers": _stabilisers,
    "scores": _scores,
    "builtins": _builtins,
    "errors": _errors,
    "plan": _plan,
    "benchmarks": _benchmarks,
    "tasks": _tasks,
    "ability": _ability,
    "fifty": _fifty,
    "corpus": _corpus,
    "masks": _masks,
    "own": _own,
    "readings": _readings,
    "same-subject": _same_subject,
    "streams": _streams,
    "paired": _paired,
    "silencing": _silencing,
    "quick": _quick,
    "elsewhere": _elsewhere,
    "leaderboard": _leaderboard,
    "leaderboard-paired": _board_paired,
    "compatibility": _compatibility,
}
