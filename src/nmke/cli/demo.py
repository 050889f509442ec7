"""`nmke demo`: real facts into a real model, shown, scored, taken back, put in again, saved, exported."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nmke.cli.batches import Outcome, edit_all
from nmke.cli.console import fact, note, say, table, working
from nmke.cli.edit_report import health_text, print_layers
from nmke.cli.export import agreement
from nmke.cli.measured import measure
from nmke.cli.opening import Loading, editing, find_place
from nmke.cli.probes import probe_rows, short
from nmke.cli.report import NAME, run_page, write_report
from nmke.cli.scoring import print_scores

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nmke.session import EditSession
    from nmke.types import EditRequest

MODEL = "smollm2-135m"
FOLDER = Path("nmke-demo")
# A fifth of the usual corpus: enough for a dozen edits, and written in half a minute.
# Batches of five of twelve facts: the last batch, which is taken back and written again, is small.
SETTINGS: dict[str, Any] = {"batch_size": 5, "corpus_tokens": 6_000}


def demo(
    limit: Annotated[int, typer.Option("--limit", min=1, help="How many facts to edit.")] = 12,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to make.")] = FOLDER,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier demo.")] = False,
) -> None:
    """Edit real facts into SmolLM2-135M on this machine, show what changed, undo, redo, save and export."""
    begun = time.monotonic()
    requests = choose_facts(limit)
    run, exported = output / "run", output / "model"
    place = find_place(MODEL, run, resume=False, force=force or _is_demo_of_default(output))
    note(f"{len(requests)} facts of ours into {MODEL} with NMKE; a few minutes on two cores")
    with editing(place, SETTINGS, Loading(), requests) as session:
        session.folder.write_recipe(SETTINGS)
        outcome = edit_all(session, requests)
        _show_edits(session, requests, outcome)
        _undo_and_redo(session, outcome)
        _report(session, outcome)
        _export(session, exported)
    fact("took", f"{time.monotonic() - begun:.0f} s")
    say()
    say("Everything is in:", "bold")
    fact("report", f"{run / NAME}   (open it in a browser: words, curves, neurons, settings)")
    fact("run", f"{run}   (record, weights before and after, settings)")
    fact("model", f"{exported}   (loads in transformers and vLLM; its README lists the changed facts)")
    say("Next:", "bold")
    for command in (
        f"nmke ask {run} 'What is the capital of Kenya?' --compare",
        f"nmke log {run}",
        f"nmke verify {run}",
        f"nmke edit {MODEL} -p 'The capital of {{France}} is' -t Lyon -o my-edits",
    ):
        say(f"  {command}")


def choose_facts(limit: int) -> list[EditRequest]:
    """Facts of ours, spread over the relations in turn."""
    from nmke.facts import bundled_facts

    by_relation: dict[str | None, list[EditRequest]] = {}
    for request in bundled_facts():
        by_relation.setdefault(request.relation, []).append(request)
    longest = max(map(len, by_relation.values()))
    turns = [facts[i] for i in range(longest) for facts in by_relation.values() if i < len(facts)]
    return turns[:limit]


def _is_demo_of_default(output: Path) -> bool:
    """The default folder is ours to replace, so that `make demo` works twice."""
    return output == FOLDER and (output / "run" / "nmke.json").is_file()


def _show_edits(session: EditSession, requests: Sequence[EditRequest], outcome: Outcome) -> None:
    rows = probe_rows(outcome.probes, outcome.before, outcome.after)
    table(("probe", "prompt", "before", "after", "p(new)"), rows, right=("p(new)",))
    written = outcome.with_status("written")
    fact("edits", f"{len(written)} of {len(requests)} say the new answer word for word")
    if outcome.seconds_per_edit is not None:
        stages = ", ".join(f"{name} {seconds:.1f}" for name, seconds in outcome.seconds.items())
        fact("time", f"{outcome.seconds_per_edit:.2f} s per edit (seconds: {stages})")
    for record in outcome.with_status("failed"):
        fact("failed", f"{short(record.request.text, 60)} → {record.request.target_new}")
    for record in outcome.with_status("known"):
        fact("known", f"{short(record.request.text, 60)} → {record.request.target_new}: skipped")
    print_layers(session, outcome, session.changed())
    fact("health", health_text(outcome))
    if outcome.scores:
        print_scores(outcome.scores)


def _undo_and_redo(session: EditSession, outcome: Outcome) -> None:
    last = outcome.reports[-1].event
    edited = session.content_hash
    session.undo(1)
    undone = session.content_hash
    same = "the hash from before it, bit for bit" if undone == last.hash_before else "ANOTHER HASH"
    fact("undo", f"batch {last.id}: content hash {edited[:12]} → {undone[:12]}, {same}")
    with working("editing the batch again"):
        list(session.edit_many([record.request for record in last.edits]))
    again = session.content_hash
    fact("redo", f"content hash {again[:12]}, {'the same as before' if again == edited else 'another one'}")


def _report(session: EditSession, outcome: Outcome) -> None:
    """A report in the run folder; the words shown above are not asked for again if the redo led to the same model."""
    from nmke.viz.run_record import read_run

    root = session.folder.root
    last = outcome.reports[-1].event.hash_after
    said = (outcome.probes, outcome.before, outcome.after) if session.content_hash == last else None
    found = measure(session, len({probe.edit_id for probe in outcome.probes}), said)
    write_report(run_page(read_run(root), found), root / NAME)


def _export(session: EditSession, path: Path) -> None:
    with working(f"exporting to {path} and loading it back"):
        from nmke.export.hf import export_hf

        report = export_hf(session, path, force=path.exists())
    fact(
        "export",
        f"{path}: {report.bytes / 1e6:.0f} MB, loaded back; {agreement(report)}",
    )
