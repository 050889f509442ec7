"""Which models can be edited? Every causal LM that the installed transformers ships, tried as a tiny random model.

Each family is built small with random weights, two facts are edited into it with `nmke` and undone, and what must
hold is looked at: see `tests/models/family_laws.py`. The record says for each family that it was edited, or the
reason why not. Random weights show that the structure is handled, not that edits of a trained model are good.

    python -m benchmarks.compatibility [--resume] [--only FAMILY,FAMILY]
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from benchmarks.record import RESULTS, write_record
from tests.models import families
from tests.models.family_laws import LINEAR, SETTINGS, Findings, try_family
from transformers.utils import logging as transformers_logging

from nmke.errors import LayoutError
from nmke.session import versions

LEAST_GAIN = 0.1  # nats; the laws of the common families ask for more
PADDING = 1e-4
# The kinds of refusal, by what the message says; the first that fits.
KINDS = {
    "mixture of experts": "mixture of experts",
    "no MLP down-projection": "no MLP between the layers (Mamba, RWKV) or mixed stacks",
    "behind padding": "reads padding: decoder halves of encoder-decoders, recurrent states",
    "no final norm": "no final norm before the unembedding (post-norm layers, encoders used as decoders)",
    "only LayerNorm and RMSNorm": "a prediction head instead of a final norm",
    "needed is [batch seq d_model]": "several residual streams, or other axes",
    "": "other structure",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="comma-separated families; nothing is written then")
    parser.add_argument("--resume", action="store_true", help="keep what the record holds of these versions")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    cells = recorded() if asked.resume else {}
    for family in asked.only.split(",") if asked.only else families.FAMILIES:
        if family in cells:
            continue
        cells[family] = examine(family)
        print(
            f"{family:28} {cells[family]['outcome']:10} {cells[family].get('reason', '')[:120]}", flush=True
        )
        if not asked.only and len(cells) % 10 == 0:
            write(cells)
    if not asked.only:
        print(f"wrote {write(cells)}")


def recorded() -> dict[str, dict[str, Any]]:
    """The cells of the record, if the same versions made it."""
    path = RESULTS / "compatibility.json"
    record = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return dict(record["cells"]) if record.get("versions") == versions() else {}


def write(cells: dict[str, dict[str, Any]]) -> Path:
    """Write the record, families in the order of transformers' list."""
    ordered = {family: cells[family] for family in families.FAMILIES if family in cells}
    outcomes = sorted(cell["outcome"] for cell in cells.values())
    counts = {name: outcomes.count(name) for name in dict.fromkeys(outcomes)}
    return write_record("compatibility", {"counts": counts, "cells": ordered})


def examine(family: str) -> dict[str, Any]:
    """What came of one family: `edited`, `wrong` (a law is broken), `refused`, `unbuilt` or `failed`, and why."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            found = try_family(family, Path(folder) / "linear", **LINEAR)
            default = try_family(family, Path(folder) / "default", **SETTINGS)
        except LayoutError as error:
            reason = str(error)
            kind = next(kind for sign, kind in KINDS.items() if sign in reason)
            return {"outcome": "refused", "kind": kind, "reason": reason}
        except Exception as error:  # a record of everything must not stop at one
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            known = families.UNBUILDABLE.get(family)
            return {"outcome": "unbuilt" if known else "failed", "reason": known or reason}
    broken = broken_laws(found) + [f"with {default.method}: {text}" for text in broken_laws(default)]
    cell = {"outcome": "wrong" if broken else "edited", **asdict(found), "default": asdict(default)}
    return {**cell, "reason": "; ".join(broken)} if broken else cell


def broken_laws(found: Findings) -> list[str]:
    """The laws that do not hold, in words."""
    laws = {
        f"the answers gained {found.gained:.2f} nats only": found.gained > LEAST_GAIN,
        f"an edit changed {found.changed:.0%} of the columns": 0 < found.changed <= 0.25,
        f"other tensors changed: {', '.join(found.others_changed[:3])}": not found.others_changed,
        "undo did not give back every byte": found.undone,
        f"padding changes log-probabilities by {found.padding_gap:.1e}": found.padding_gap < PADDING,
    }
    return [text for text, holds in laws.items() if not holds]


if __name__ == "__main__":
    main()
