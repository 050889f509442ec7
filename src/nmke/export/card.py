"""The model card of an exported model: it says first of all that facts were changed, and which."""

from __future__ import annotations

import re
from pathlib import Path

import nmke
from nmke.run_folder import RunFolder
from nmke.session import EditSession, versions

MANIFEST = "nmke-export.json"
MOST_FACTS = 1000
LOAD_HEADING = "## How to load it"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def write_card(session: EditSession, folder: Path, format_name: str, load: str = "") -> None:
    """Write README.md and `nmke-export.json` into `folder`.

    Args:
        session: What is exported.
        folder: Where the files go.
        format_name: Registered name of the format.
        load: The line that loads or serves it, if the card shall end with it.
    """
    text = card_text(session) + (f"\n{LOAD_HEADING}\n\n    {load}\n" if load else "")
    (folder / "README.md").write_text(text, encoding="utf-8")
    requests = session.active_requests()
    content = {
        "schema": "nmke.export/1",
        "format": format_name,
        "base": session.folder.read_manifest()["base"],
        "content_hash": session.content_hash,
        "edits": [request.id for request in requests],
        "changed_tensors": {c.name: {"columns": c.columns, "of": c.of} for c in session.changed()},
        "versions": versions(),
    }
    RunFolder.write_json(folder / MANIFEST, content)


def card_text(session: EditSession) -> str:
    """The card, in Markdown with the YAML head that model hubs read."""
    base = session.folder.base
    records = _active_records(session)
    lines = [
        "---",
        *([f"base_model: {base.source}"] if HUB_ID.fullmatch(base.source) else []),
        "tags: [knowledge-editing, nmke]",
        "---",
        f"# {base.name}, with {len(records)} facts changed",
        "",
        "**Facts in this model were changed on purpose and may be wrong.** It was made from "
        f"`{base.name}` with nmke {nmke.__version__}; everything else is as in the base model, whose licence applies.",
        "",
        "| prompt | answer before (as stated) | new answer | p(new) after |",
        "|---|---|---|---|",
        *[_row(*record) for record in records[:MOST_FACTS]],
    ]
    if len(records) > MOST_FACTS:
        lines.append(f"\n{len(records) - MOST_FACTS} more are listed in `{MANIFEST}` by id.")
    lines += ["", "## What changed in the weights", ""]
    lines += [f"- `{c.name}`: {c.columns} of {c.of} columns" for c in session.changed()]
    lines += [
        "",
        f"Content hash `{session.content_hash}`, base weights `{base.fingerprint}`.",
        "p(new): probability of the whole new answer after the prompt, measured right after each edit.",
        "",
    ]
    return "\n".join(lines)


def _active_records(session: EditSession) -> list[tuple[str, str, str, str]]:
    active = {request.id for request in session.active_requests()}
    found: dict[str, tuple[str, str, str, str]] = {}
    for seq in session.ledger.active():
        for record in session.ledger.event(seq).edits:
            request, probability = record.request, record.detail.get("probability_after")
            if request.id in active and probability is not None:
                found[request.id] = (
                    request.text,
                    request.target_true or "",
                    request.target_new,
                    f"{probability:.2f}" + (" (did not take)" if record.status == "failed" else ""),
                )
    return list(found.values())


def _row(*cells: str) -> str:
    return "| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in cells) + " |"
