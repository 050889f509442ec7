"""The report of a run: what changed in words first, then whether it lasts, what it cost, and how to do it again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nmke.active_edits import Status
from nmke.evaluation.metrics import contains_answer
from nmke.viz.charts import run_figures
from nmke.viz.figures import Figure, plain
from nmke.viz.report import Cell, Kind, Report, Section, Table
from nmke.viz.run_details import MOST_ROWS, again_section, facts_section, settings_section
from nmke.viz.run_record import RunRecord
from nmke.viz.scales import counted, label
from nmke.viz.stability_charts import stability_figures

STATUSES: tuple[Status, ...] = ("written", "failed", "known")
STREAM = ("scores", "stream", "probability", "score-stream")
HEALTH = ("kl", "perplexity")
NEURONS = ("neurons", "neuron-use")
SCOPES = {"edit": "one for each edit"}
PARTS = {"edit": "the edit itself", "paraphrase": "asked in other words", "neighbour": "must stay"}


def run_report(
    run: RunRecord,
    *,
    texts: Sequence[Mapping[str, Any]],
    stability: Mapping[str, Any],
    neurons: Section | None = None,
    made: str,
) -> Report:
    """The report of a run.

    Args:
        run: What its folder says.
        texts: Probes with the words of the unedited and of the edited model; empty without.
        stability: What `measure_stability` found; {} without.
        neurons: A section on a record of `nmke neurons`, if there is one.
        made: When and with what the report was made.
    """
    figures = {figure.id: figure for figure in run_figures(run)}
    sections = [
        _texts(texts),
        _outcome(run, _pick(figures, STREAM)),
        _health(run, _pick(figures, HEALTH)),
        _weights(stability, _pick(figures, ("drift",))),
        _neurons(run, _pick(figures, NEURONS)),
        neurons,
        settings_section(run, _pick(figures, ("seconds",))),
        facts_section(run),
        again_section(run),
    ]
    return Report(
        title=f"{run.base.name}: {counted(len(run.held), 'edited fact')}",
        lead=f"Run {run.name!r} on {run.base.source}, begun {run.created}.",
        notice="Facts in this model were changed on purpose and may be wrong. Pass this report on with the model."
        if run.batches
        else "Nothing is edited: the model is the unedited one.",
        tiles=_tiles(run),
        sections=tuple(section for section in sections if section is not None),
        made=made,
        about=_about(run, texts, stability),
    )


def _pick(figures: Mapping[str, Figure], names: Sequence[str]) -> tuple[Figure, ...]:
    return tuple(figures[name] for name in names if name in figures)


def _tiles(run: RunRecord) -> tuple[tuple[str, str, str], ...]:
    counts = {status: sum(b.count(status) for b in run.batches) for status in STATUSES}
    given, seconds = sum(counts.values()), _seconds(run)
    tiles = [
        ("facts that took", f"{counts['written']} of {given - counts['known']}", _left_out(counts["known"])),
        (
            "method",
            str(run.config.get("method", "none")),
            f"in {counted(len(run.batches), 'batch', 'batches')}",
        ),
    ]
    kept, per_edit = _kept(run, "kept"), _kept(run, "kept_per_edit")
    if per_edit is not None:
        tiles.append(
            ("neurons per edit", f"{per_edit:.0%}", f"of each edited layer; a whole batch {kept:.0%}")
        )
    elif kept is not None:
        tiles.append(("neurons that may change", f"{kept:.0%}", "of each edited layer, mean over batches"))
    health = run.last_health
    if health:
        perplexity = f"{label(health['perplexity_base'])} → {_number(health['perplexity'])}"
        tiles.append(("health", health["status"], "; ".join(health["reasons"]) or "no limit crossed"))
        tiles.append(("perplexity, held-out text", perplexity, "unedited → edited"))
        if health["retention"] is not None:
            tiles.append(
                ("retention", f"{health['retention']:.0%}", f"of {health['asked']} earlier edits, last look")
            )
    if seconds is not None:
        tiles.append(("time per edit", f"{label(seconds)} s", "edit stages only"))
    return tuple(tiles)


def _left_out(known: int) -> str:
    return f"{known} more were known already" if known else "say the new answer word for word"


def _kept(run: RunRecord, name: str) -> float | None:
    """Mean share of neurons over layers and batches, None where no mask has that count."""
    details = [
        detail for batch in run.batches for detail in batch.per_layer("masks").values() if name in detail
    ]
    shares = [detail[name] / detail["d_mlp"] for detail in details]
    return sum(shares) / len(shares) if shares else None


def _seconds(run: RunRecord) -> float | None:
    edited = sum(batch.count("written") + batch.count("failed") for batch in run.batches)
    total = sum(sum((batch.event.body.get("seconds") or {}).values()) for batch in run.batches)
    return total / edited if edited else None


def _number(value: float | None) -> str:
    return "not finite" if value is None else label(value)


def _texts(texts: Sequence[Mapping[str, Any]]) -> Section | None:
    if not texts:
        return None
    rows = tuple(
        (
            PARTS.get(probe["kind"], probe["kind"]),
            probe["prompt"],
            probe["before"]["text"] or "(nothing)",
            Cell(probe["after"]["text"] or "(nothing)", _verdict(probe)),
            probe["target_new"],
            Cell(f"{probe['before']['p_new']:.2f} → {probe['after']['p_new']:.2f}", "number"),
        )
        for probe in texts
    )
    columns = ("what", "prompt", "unedited model says", "edited model says", "new answer", "p(new answer)")
    note = (
        "Greedy continuation of at most 8 tokens, cut at a newline. Edits and other words: ✓ the new answer stands in "
        "the text, ✗ it does not. What must stay: ✓ word for word as before, ✗ the new answer has leaked into it, "
        "unmarked: other words than before. p: probability of the whole new answer, unedited → edited."
    )
    return Section("words", "Before and after, in words", tables=(Table("words", columns, rows, note=note),))


def _verdict(probe: Mapping[str, Any]) -> Kind:
    """Good, bad, or neither for a neighbour that is answered in other words."""
    before, after = probe["before"]["text"], probe["after"]["text"]
    answered = contains_answer(after, probe["target_new"])
    if probe["kind"] != "neighbour":
        return "good" if answered else "bad"
    if before == after:
        return "good"
    return "bad" if answered and not contains_answer(before, probe["target_new"]) else "text"


def _outcome(run: RunRecord, figures: tuple[Figure, ...]) -> Section | None:
    if not figures:
        return None
    tables = []
    now = [record for record in run.scores if record.content_hash == run.content_hash]
    rows = tuple(
        (
            scores["version"],
            name.replace("_", " "),
            Cell(f"{scores[name]:.3f}", "number"),
            Cell(f"{low:.3f} to {high:.3f}", "number"),
            Cell(str(scores["n"]), "number"),
            Cell(str(scores["counts"].get(name, "")), "number"),
        )
        for record in now
        for scores in record.protocols.values()
        for name, (low, high) in scores["intervals"].items()
    )
    if rows:
        columns = ("protocol", "metric", "mean", "95 % interval", "facts", "prompts")
        tables.append(Table("scores", columns, rows, "Scores after the last edit"))
    text = () if rows else ("The model as it is now was not scored; `nmke eval RUN` does that.",)
    failed = tuple(
        (r.request.id, r.request.text, r.request.target_new, str(r.detail.get("reason", "")))
        for r in run.held
        if r.status == "failed"
    )
    if failed:
        title = f"{counted(len(failed), 'fact')} that did not take"
        heads = ("edit", "prompt", "new answer", "why")
        tables.append(Table("failed", heads, failed[:MOST_ROWS], title, folded=len(failed) > 5))
    return Section("edits", "Do the edits hold?", text, tuple(tables), figures)


def _health(run: RunRecord, figures: tuple[Figure, ...]) -> Section | None:
    looked = [batch for batch in run.batches if batch.health]
    if not looked:
        return None
    crossed = tuple(
        (batch.event.id, Cell(str(batch.edits), "number"), Cell(batch.health["status"], "bad"), reason)
        for batch in looked
        for reason in batch.health["reasons"]
    )
    columns = ("batch", "edits so far", "status", "why")
    tables = (Table("health", columns, crossed[-MOST_ROWS:], "Limits that were crossed"),) if crossed else ()
    text = f"The model was looked at after {len(looked)} of {len(run.batches)} batches."
    return Section("health", "Is the rest of the model well?", (text,), tables, figures)


def _weights(stability: Mapping[str, Any], drift: tuple[Figure, ...]) -> Section | None:
    layers = dict(stability.get("layers") or {})
    if not layers and not drift:
        return None
    rows = tuple(
        (
            layer,
            Cell(f"{numbers['changed']} of {numbers['columns']}", "number"),
            Cell(f"{numbers['relative_norm']:.2%}", "number"),
            Cell(label(numbers["wasserstein"]), "number"),
            Cell(f"{numbers['cosine_mean']:.4f} ± {numbers['cosine_std']:.4f}", "number"),
            Cell(f"{numbers['cosine_min']:.3f}", "number"),
            Cell(f"{numbers['spectral_growth']:.3f}", "number"),
        )
        for layer, numbers in layers.items()
    )
    columns = (
        "layer", "columns changed", "‖ΔW‖ / ‖W‖", "W₁ of column norms", "cosine, mean ± sd", "lowest cosine",
        "σ₁ now / before",
    )  # fmt: skip
    note = (
        "Each edited matrix against the base, one column per neuron: a plain number is the layer's down-projection, "
        "gate and up are what its neurons read through. W₁: first Wasserstein distance between the norms of its "
        "columns before and after, in the weights' units. Cosine: of each column before and after, over all columns. "
        "σ₁: largest singular value."
    )
    tables = (Table("stability", columns, rows, note=note),) if rows else ()
    return Section(
        "weights", "How far did the weights move?", (), tables, (*drift, *stability_figures(stability))
    )


def _neurons(run: RunRecord, figures: tuple[Figure, ...]) -> Section | None:
    if not figures:
        if not run.batches:
            return None
        text = f"Method {run.config.get('method')!r} used no neuron mask: every batch may write into all neurons."
        return Section("neurons", "Which neurons carry it?", (text,))
    text = (
        f"Neurons were scored by {run.config.get('attribution')!r} at the {run.config.get('attribution_token')} token; "
        f"mask {run.config.get('mask')!r}, {SCOPES.get(str(run.config.get('mask_scope')), 'one for each batch')}, "
        f"{run.config.get('placement')}. For a map of all layers: "
        f"`nmke neurons {run.name} -o {run.name}/neurons.json`, then this report again."
    )
    return Section("neurons", "Which neurons carry it?", (text,), figures=figures)


def _about(
    run: RunRecord, texts: Sequence[Mapping[str, Any]], stability: Mapping[str, Any]
) -> dict[str, Any]:
    return dict(
        plain(
            {
                "run": str(run.root),
                "base": vars(run.base),
                "content_hash": run.content_hash,
                "config": run.config,
                "texts": [dict(probe) for probe in texts],
                "stability": dict(stability),
                "health": run.last_health,
                "scores": [vars(record) for record in run.scores],
            }
        )
    )
