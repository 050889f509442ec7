"""`reproduce.json`: what a run was made from and with, on one page; `nmke reproduce` reads and checks it.

Everything in it that decides a bit stands in the ledger too, which is hash-chained; this file is the summary that can
be published. The user's home folder is written as `~`, so that no account's name leaks.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nmke.config import EditConfig
from nmke.damage import load_json, reason
from nmke.environment import environment
from nmke.errors import VerifyError
from nmke.events import Event
from nmke.ledger import Ledger
from nmke.models.load import EditableModel
from nmke.run_folder import RunFolder
from nmke.types import EditRequest

FILE = "reproduce.json"
SCHEMA = "nmke.provenance/1"
MOST_COMMANDS = 20


def facts_digest(before: str, requests: Sequence[EditRequest]) -> str:
    """Hash over the facts of a batch and, through `before`, of all active batches in front of it."""
    content = json.dumps([asdict(request) for request in requests], sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(f"{before}|{content}".encode()).hexdigest()


def settings_digest(settings: dict[str, Any]) -> str:
    """Hash of settings, whatever their order."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def active_facts(ledger: Ledger) -> str:
    """`facts_digest` of everything that is active, "" without a batch."""
    active = ledger.active()
    return str(ledger.event(active[-1]).body.get("facts_sha256", "")) if active else ""


def write_provenance(folder: RunFolder, ledger: Ledger, model: EditableModel) -> None:
    """Bring `reproduce.json` up to the newest event; a disk that refuses is no error, the ledger has it all."""
    active, last = ledger.active(), ledger.last()
    newest = ledger.event(active[-1]).body if active else {}
    base = folder.base
    content = {
        "schema": SCHEMA,
        "how": "nmke reproduce RUN",
        "commands": _commands(folder.root / FILE),
        "model": {**asdict(base), "source": without_home(base.source)},
        "contexts_sha256": hashlib.sha256("\x1f".join(folder.contexts).encode()).hexdigest(),
        "batches": len(active),
        "facts_sha256": newest.get("facts_sha256", ""),
        "seed": newest.get("config", {}).get("seed", EditConfig.create().seed),
        "settings": {name: without_home(value) for name, value in newest.get("config", {}).items()},
        "settings_sha256": settings_digest(newest.get("config", {})),
        "statistics_sha256": newest.get("statistics", {}),
        "environment": newest.get("environment", environment(model.device)),
        "events": 0 if last is None else last.seq,
        "ledger_chain": "" if last is None else last.chain,
        "content_hash": "" if last is None else last.hash_after,
    }
    with suppress(OSError):
        folder.write_json(folder.root / FILE, content)


def check_provenance(folder: RunFolder, ledger: Ledger) -> None:
    """Raise if `reproduce.json` contradicts the ledger; runs without one pass.

    It is written after the ledger's row, so a killed process or a full disk can leave it at an earlier event: it must
    then fit that event.

    Raises:
        VerifyError: Names what differs.
    """
    path = folder.root / FILE
    if not path.is_file():
        return
    try:
        content = load_json(path.read_text(encoding="utf-8"))
        said = {
            name: content[name]
            for name in ("schema", "events", "ledger_chain", "content_hash", "facts_sha256")
        }
        fingerprint = content["model"]["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise VerifyError(
            f"{str(path)!r} is damaged ({reason(error)}); restore the run from a backup"
        ) from error
    expected = {"schema": SCHEMA, **_standing(ledger, said["events"])}
    wrong = [name for name, value in expected.items() if said[name] != value]
    if fingerprint != folder.base.fingerprint:
        wrong.append("model.fingerprint")
    if wrong:
        raise VerifyError(
            f"{str(path)!r} and the ledger differ in {', '.join(wrong)}; one of them was changed: restore the run from "
            "a backup"
        )


def provenance_is_current(folder: RunFolder, ledger: Ledger) -> bool:
    """Whether `reproduce.json` stands at the newest event."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        content = load_json((folder.root / FILE).read_text(encoding="utf-8"))
        return bool(content["events"] == ledger.last_seq())
    return False


def _standing(ledger: Ledger, events: object) -> dict[str, Any]:
    """What the ledger says of its state after that many events."""
    newest = ledger.last_seq()
    if not isinstance(events, int) or not 0 <= events <= newest:
        return {"events": newest}
    if events == 0:
        return {"ledger_chain": "", "content_hash": ""}
    event = ledger.event(events)
    now = {"facts_sha256": active_facts(ledger)} if events == newest else {}
    return {"ledger_chain": event.chain, "content_hash": event.hash_after, **now}


def without_home(value: Any) -> Any:
    """The value, a path under the user's home folder with `~` in its place."""
    home = str(Path.home())
    if not isinstance(value, str) or home == "/":
        return value
    return f"~{value[len(home) :]}" if value == home or value.startswith(home + "/") else value


def _commands(path: Path) -> list[str]:
    """The commands that wrote to the run, the newest last."""
    known: list[str] = []
    with suppress(OSError, ValueError, KeyError, TypeError):
        known = [str(command) for command in load_json(path.read_text(encoding="utf-8"))["commands"]]
    program = Path(sys.argv[0]).name if sys.argv and sys.argv[0] else "python"
    words = ["nmke", *sys.argv[1:]] if program in ("nmke", "__main__.py") else [f"Python ({program})"]
    command = " ".join(without_home(word) for word in words)[:2000]
    return known if known[-1:] == [command] else [*known, command][-MOST_COMMANDS:]


def last_environment(event: Event) -> dict[str, Any]:
    """What a batch was computed on; {} in runs that did not write it down."""
    return dict(event.body.get("environment", {}))
