"""What `nmke edit` says when it is done: a table, a few labelled lines, or one JSON object."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from nmke.bench.machine import peak_rss_mb
from nmke.cli.console import fact, say, table
from nmke.cli.probes import probe_rows, probes_json, short
from nmke.cli.scoring import score_line

if TYPE_CHECKING:
    from nmke.cli.batches import Outcome
    from nmke.health import HealthReport
    from nmke.session import EditSession
    from nmke.types import EditRequest, MatrixPlace
    from nmke.weights_state import ChangedTensor

SHOWN_FAILURES = 8


def edit_json(session: EditSession, outcome: Outcome) -> dict[str, Any]:
    """The object that `nmke edit --json` prints."""
    return {
        "schema": "nmke.edit/1",
        "run": str(session.folder.root),
        "model": session.model.source,
        "method": session.config.method,
        "n_edits": outcome.n_edits,
        "n_written": len(outcome.with_status("written")),
        "n_failed": len(outcome.with_status("failed")),
        "n_known": len(outcome.with_status("known")),
        "n_skipped": outcome.skipped,
        "interrupted": outcome.interrupted,
        "seconds_per_edit": outcome.seconds_per_edit,
        "seconds": {**outcome.seconds, "prepare": outcome.prepare_seconds},
        "peak_rss_mb": peak_rss_mb(),
        "scores": outcome.scores.to_json() if outcome.scores else {},
        "checkpoints": outcome.checkpoints.records,
        "probes": probes_json(outcome.probes, outcome.before, outcome.after) if outcome.after else [],
        "failed": [_failure(r.request, r.detail) for r in outcome.with_status("failed")],
        "known": [r.request.id for r in outcome.with_status("known")],
        "masks": {str(k): v for k, v in outcome.reports[-1].masks.items()} if outcome.reports else {},
        "health": health.as_json() if (health := last_health(outcome)) else None,
        "drift": {str(k): v for k, v in session.weights.drift().items()},
        "changed_tensors": [asdict(changed) for changed in session.changed()],
        "side_memory": list(session.weights.side.recalled),
        "content_hash": session.content_hash,
        "config": session.config.model_dump(mode="json"),
    }


def print_edit(session: EditSession, requests: Sequence[EditRequest], outcome: Outcome) -> None:
    """The same for people."""
    if outcome.after:
        rows = probe_rows(outcome.probes, outcome.before, outcome.after)
        table(("probe", "prompt", "before", "after", "p(new)"), rows, right=("p(new)",))
    changes = session.changed()
    fact("edits", _counts(session, outcome, changes))
    print_layers(session, outcome, changes)
    if last_health(outcome):
        fact("health", health_text(outcome))
    if outcome.scores:
        score_line(outcome.scores.protocols["teacher_forced"])
    _print_exceptions(outcome)
    root = session.folder.root
    fact("saved", f"{root}   content hash {session.content_hash[:12]}")
    if outcome.reports:
        fact("undo", f"nmke undo {root} -n {len(outcome.reports)}")
    if outcome.interrupted:
        left = len(requests) - outcome.skipped - outcome.n_edits
        fact("stopped", f"{left} facts are left; the same command with --resume goes on")
    else:
        export = "" if session.weights.side.recalled else f"\nnmke export {root} --to hf -o OUT"
        fact("next", f"nmke chat {root} --compare{export}")


def print_layers(session: EditSession, outcome: Outcome, changes: Sequence[ChangedTensor]) -> None:
    """Per edited layer: neurons selected by the last batch, columns that differ from the base, drift."""
    if not changes:
        fact("changed", side_text(session) or "nothing: the model is the base model")
        return
    masks = next((report.masks for report in reversed(outcome.reports) if report.masks), {})
    drift = session.weights.drift()
    columns: tuple[str, ...] = ("layer", "columns changed", "drift")
    rows: list[tuple[str, ...]] = [
        (c.place.label, _share(c.columns, c.of), _drift(c.place, drift)) for c in changes
    ]
    note = "drift: ‖ΔW‖/‖W‖ of the down-projection against the base"
    whole_neurons = any(
        "free" in detail for detail in masks.values()
    )  # the columns changed are all there is to say
    if masks and not whole_neurons:
        columns += ("neurons selected", "entropy")
        rows = [row + _selected(masks.get(c.layer)) for row, c in zip(rows, changes, strict=True)]
        note += "; neurons and entropies: of the last batch"
    table(columns, rows, right=columns)
    fact("", note)
    names = [c.name for c in changes]
    count = f"{len(names)} tensor{'s' if len(names) > 1 else ''}"
    fact("changed", f"{count}: {names[0]}{f' … {names[-1]}' if len(names) > 1 else ''}")


def side_text(session: EditSession) -> str:
    """What the run keeps beside the weights, in words; "" when nothing."""
    side = session.weights.side
    if not side.recalled:
        return ""
    size = sum(tensor.nbytes for tensor in side.tensors().values()) / 1024
    return (
        f"no weight; a side memory of {side.recalled[0]!r} ({size:.0f} KB), looked up while the session is open; "
        "it cannot be exported"
    )


def last_health(outcome: Outcome) -> HealthReport | None:
    """The newest look at the model's health, None when it was not looked at."""
    return next((r.health for r in reversed(outcome.reports) if r.health is not None), None)


def health_text(outcome: Outcome) -> str:
    """The newest look at the model's health, in words; "" when it was not looked at."""
    from nmke.health import in_six_places

    health = last_health(outcome)
    if health is None:
        return ""
    text = (
        f"{health.status}: KL to the unedited model {health.kl:.3f} nats, perplexity on held-out text "
        f"{in_six_places(health.perplexity)} (unedited {health.perplexity_base:.2f})"
    )
    if health.retention is not None:
        text += f", retention of {health.asked} earlier edits {health.retention:.2f}"
    return "\n".join([text, *health.reasons])


def _selected(detail: dict[str, float] | None) -> tuple[str, str]:
    if detail is None:
        return "", ""
    if "edit_entropy" in detail:
        return f"{detail['kept']:.0f}, {detail['kept_per_edit']:.0f} an edit", f"{detail['edit_entropy']:.2f}"
    return _share(
        int(detail["kept"]), int(detail["d_mlp"])
    ), f"{detail['general_entropy']:.2f} / {detail['specific_entropy']:.2f}"


def _share(part: int, whole: int) -> str:
    share = part / whole
    return f"{part} of {whole} ({share:.0%})" if share >= 0.01 else f"{part} of {whole} ({share:.2%})"


def _drift(place: MatrixPlace, drift: dict[int, float]) -> str:
    return f"{drift[place.layer]:.2%}" if place.part == "down" else ""


def _counts(session: EditSession, outcome: Outcome, changes: Sequence[ChangedTensor]) -> str:
    config, per_edit = session.config, outcome.seconds_per_edit
    changed = sorted({change.layer for change in changes})
    layers = ", ".join(map(str, changed or config.layers or ()))
    text = (
        f"{len(outcome.with_status('written'))} of {outcome.n_edits} written with {config.method!r} "
        f"into layers {layers}"
    )
    if per_edit is None:
        return text
    stages = ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in outcome.seconds.items())
    return f"{text}\n{per_edit:.2f} s per edit (seconds: {stages})"


def _print_exceptions(outcome: Outcome) -> None:
    known, failed = outcome.with_status("known"), outcome.with_status("failed")
    if known:
        names = ", ".join(record.request.id for record in known[:5])
        more = f" and {len(known) - 5} more" if len(known) > 5 else ""
        fact("known", f"{len(known)} skipped, the model says them already: {names}{more}")
    for record in failed[:SHOWN_FAILURES]:
        asked = f"{short(record.request.text, 60)} → {record.request.target_new}"
        fact("failed", f"{record.request.id}  {asked}\n{record.detail.get('reason', '')}")
    if len(failed) > SHOWN_FAILURES:
        say(f"          and {len(failed) - SHOWN_FAILURES} more; `nmke log` lists them")


def _failure(request: EditRequest, detail: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": request.id,
        "prompt": request.text,
        "target_new": request.target_new,
        "reason": detail.get("reason"),
        "probability": detail.get("probability_after"),
    }
