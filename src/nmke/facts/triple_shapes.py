"""Shapes made of triples: ConflictEdit and RoundEdit (arXiv:2310.02129), and ROME's known facts.

ConflictEdit edits two facts of which the second contradicts what the first implies. Asked afterwards:
`conflict`, the second fact, whose answer must be likelier than what the first implies; `reversal`, what the
second implies for its new object (reverse edits); `tied_fact`, the fact that joins the two (composite edits).
RoundEdit edits a fact with several true objects away and back; `one_to_many` asks whether each other true
object is likelier than the object that was edited in and out again (one minus the paper's ignore rate).
"""

from __future__ import annotations

import hashlib
from typing import Any

from nmke.facts.record import Record
from nmke.facts.shape import Shape, string, template
from nmke.types import EditCase, EditRequest, Question


def _conflict(record: Record, derived: bool) -> EditCase:
    edits = [record.nested(f"edits[{i}]", item) for i, item in enumerate(record.items("edits"))]
    if len(edits) != 2:
        raise record.unusable("edits", f"holds {len(edits)} edits; a conflict needs 2")
    kind = record.text("type")
    first, second = (_triple_request(edit, string(edit, "new_object")) for edit in edits)
    if kind == "reverse":
        implied = first.subject
        questions = [_reversal(edits[0], second.target_new, first.target_new)]
    else:
        implied = first.target_new
        questions = _tied_facts(record)
    rival = None if implied == second.target_new else implied
    questions.append(Question("conflict", second.text, (second.target_new,), rival))
    return _named(record, "conflict", [first, second], questions)


def _reversal(edit: Record, subject: str, answer: str) -> Question:
    """The first edit's relation, asked of the second edit's new object: it now leads to the same object."""
    relation = edit.nested("relation", edit.data.get("relation"))
    return Question("reversal", relation.text("prompt").replace("{}", subject), (answer,))


def _tied_facts(record: Record) -> list[Question]:
    """The facts that must go on holding for the two edits to contradict each other."""
    triples, found = record.items("triples"), []
    for place in record.items("prerequisites"):
        if not isinstance(place, int) or not 0 <= place < len(triples):
            raise record.error("prerequisites", f"{place!r} is no place in `triples`")
        triple = record.nested(f"triples[{place}]", triples[place])
        prompt, subject = _prompt(triple)
        found.append(Question("tied_fact", prompt.replace("{}", subject), (string(triple, "object"),)))
    return found


def _round(record: Record, derived: bool) -> EditCase:
    edit = record.nested("edit", record.data.get("edit"))
    away = _triple_request(edit, string(edit, "new_object"))
    back = _triple_request(edit, string(edit, "object"))
    kept = [_label(record, i, item) for i, item in enumerate(record.items("true_objects"))]
    questions = [
        Question("one_to_many", away.text, (label,), away.target_new)
        for label in dict.fromkeys(kept)
        if label not in (back.target_new, away.target_new)
    ]
    return _named(record, "round", [away, back], questions)


def _label(record: Record, index: int, item: Any) -> str:
    return record.nested(f"true_objects[{index}]", item).text("label").strip()


def _triple_request(edit: Record, target: str) -> EditRequest:
    relation = edit.nested("relation", edit.data.get("relation"))
    prompt, subject = _prompt(edit)
    query = relation.optional("query")
    return EditRequest(
        prompt=prompt,
        subject=subject,
        target_new=target,
        target_true=string(edit, "object"),
        relation=relation.optional("id"),
        paraphrases=(query.replace("{}", subject),) if query else (),
    )


def _prompt(triple: Record) -> tuple[str, str]:
    relation = triple.nested("relation", triple.data.get("relation"))
    return template(relation, "prompt", string(triple, "subject"))


def _named(record: Record, prefix: str, requests: list[EditRequest], questions: list[Question]) -> EditCase:
    """The case, its id from the record or from its content, and its requests numbered behind it."""
    content = "\x1f".join(part for r in requests for part in (r.prompt, r.subject, r.target_new))
    derived = f"{prefix}-{hashlib.sha256(content.encode()).hexdigest()[:12]}"
    name = record.identifier("case_id", prefix) or derived
    numbered = (
        EditRequest(
            r.prompt, r.subject, r.target_new, f"{name}-{i}", r.target_true, r.relation, r.paraphrases
        )
        for i, r in enumerate(requests, start=1)
    )
    return EditCase(tuple(numbered), name, tuple(questions))


def _known(record: Record, derived: bool) -> EditCase:
    prompt, subject = template(record, "prompt", record.text("subject"))
    request = EditRequest(
        prompt=prompt,
        subject=subject,
        target_new=record.text("attribute").strip(),
        id=record.identifier("known_id", "known"),
        relation=record.optional("relation_id"),
    )
    return EditCase((request,))


CONFLICT = Shape(
    "conflict",
    "ConflictEdit, two facts that contradict each other",
    frozenset({"triples", "edits"}),
    frozenset({"case_id", "type", "triples", "prerequisites", "edits"}),
    _conflict,
)
ROUND = Shape(
    "round",
    "RoundEdit, a fact edited away and back",
    frozenset({"true_objects"}),
    frozenset({"case_id", "edit", "true_objects"}),
    _round,
)
KNOWN = Shape(
    "known",
    "known facts of ROME: true already, to measure and not to edit",
    frozenset({"known_id", "attribute"}),
    frozenset({"known_id", "subject", "attribute", "prompt", "relation_id"}),
    _known,
)
