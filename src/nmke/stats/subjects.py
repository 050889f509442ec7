"""Ordinary subjects: invented names of people, places, bodies and works, in the beginnings of plain sentences.

The end of a name in a sentence about it looks like any other such end, and like little else in running text; so do the
first tokens of a text. What is to answer to one subject only (`nmke.editors.nmke`) is therefore also told from
these.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from importlib import resources

from nmke.models.load import EditableModel
from nmke.types import EditRequest

COUNT = 2000
KINDS = ("person", "place", "body", "work")
RECIPE = "ordinary-subjects/2"  # part of the cache's key: raise it with the names or with how they are drawn


def ordinary_subjects(count: int = COUNT, seed: int = 0) -> list[EditRequest]:
    """Invented names in plain sentences, drawn from lists of the package; the answers mean nothing."""
    parts = json.loads(resources.files("nmke.data").joinpath("subjects.json").read_text(encoding="utf-8"))
    drawn = random.Random(seed)
    return [
        EditRequest(drawn.choice(parts["frames"]), _name(parts, drawn), "it", id=f"subject{number}")
        for number in range(count)
    ]


def _name(parts: dict[str, list[str]], drawn: random.Random) -> str:
    kind = drawn.choice(KINDS)
    if kind == "person":
        return f"{drawn.choice(parts['given'])} {drawn.choice(parts['family'])}"
    return drawn.choice(parts[f"{kind}_kind"]).format(drawn.choice(parts["place"]))


def subject_windows(model: EditableModel, requests: Sequence[EditRequest]) -> list[list[int]]:
    """Token ids of each sentence up to the end of its name, without those where a name is the model's first token."""
    heads = model.encoder.encode_heads([(request.text, request.subject_end) for request in requests])
    return [ids for ids in heads if len(ids) > 1]
