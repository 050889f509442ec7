"""Shapes with one fact a record, written in plain fields: our own, ZsRE, EasyEdit, KnowEdit, WikiBigEdit."""

from __future__ import annotations

import re
from typing import Any

from nmke.facts.prompts import fill_subject
from nmke.facts.record import Record
from nmke.facts.shape import Shape, template
from nmke.types import EditCase, EditRequest, Neighbor, Question

OWN_FIELDS = (
    "id", "prompt", "subject", "target_new", "target_true", "relation", "paraphrases", "neighborhood",
)  # fmt: skip
_FLAT = ("case_id", "prompt", "subject", "target_new", "ground_truth", "rephrase_prompt")


def _own(record: Record, derived: bool) -> EditCase:
    record.closed(OWN_FIELDS)
    prompt, subject = template(record, "prompt", record.optional("subject"))
    request = EditRequest(
        prompt=prompt,
        subject=subject,
        target_new=record.text("target_new").strip(),
        id=record.identifier("id", "nmke"),
        target_true=record.optional("target_true"),
        relation=record.optional("relation"),
        paraphrases=tuple(fill_subject(text, subject) for text in record.texts("paraphrases")),
        neighborhood=tuple(
            _neighbor(record, index, item) for index, item in enumerate(record.items("neighborhood"))
        ),
    )
    return EditCase((request,))


def _neighbor(record: Record, index: int, item: Any) -> Neighbor:
    name = f"neighborhood[{index}]"
    if isinstance(item, str):
        return Neighbor(record.checked(name, item))
    nested = record.nested(name, item)
    nested.closed(("prompt", "answer"))
    return Neighbor(nested.text("prompt"), nested.optional("answer"))


def _zsre(record: Record, derived: bool) -> EditCase:
    prompt, subject = template(record, "src", record.text("subject"))
    request = EditRequest(
        prompt=prompt,
        subject=subject,
        target_new=record.text("alt").strip(),
        id=record.identifier("case_id", "zsre"),
        target_true=record.first("answers"),
        paraphrases=record.texts("rephrase"),
        neighborhood=tuple(Neighbor(text, record.first("loc_ans")) for text in record.texts("loc")),
    )
    return EditCase((request,))


def _easyedit(record: Record, derived: bool) -> EditCase:
    prompt, subject = template(record, "prompt", record.text("subject"))
    answer = record.first("locality_ground_truth")
    request = EditRequest(
        prompt=prompt,
        subject=subject,
        target_new=record.text("target_new").strip(),
        id=record.identifier("case_id", "easyedit"),
        target_true=record.first("ground_truth"),
        paraphrases=record.texts("rephrase_prompt"),
        neighborhood=tuple(Neighbor(text, answer) for text in record.texts("locality_prompt")),
    )
    return EditCase((request,), questions=_out_of_distribution(record, request.text))


def _out_of_distribution(record: Record, prompt: str) -> tuple[Question, ...]:
    """WISE's temporal text: another text on the subject; what both begin with is given, the rest is foretold."""
    text = record.optional("ood_rephrase") or ""
    ends = [match.end() for match in re.finditer(r"\w\b", text)]
    opening = next((text[:end] for end in reversed(ends) if prompt.startswith(text[:end])), "")
    rest = text[len(opening) :]
    return (Question("out_of_distribution", opening, (rest,)),) if opening and rest.strip() else ()


def _knowedit(record: Record, derived: bool) -> EditCase:
    prompt, subject = template(record, "prompt", record.text("subject"))
    neighbors = [
        Neighbor(item.text("prompt"), item.first("ground_truth")) for _, item in _groups(record, "locality")
    ]
    questions = [
        Question(_snake(group), item.text("prompt"), answers)
        for group, item in _groups(record, "portability")
        if (answers := item.answers("ground_truth"))
    ]
    request = EditRequest(
        prompt=prompt,
        subject=subject,
        target_new=record.text("target_new").strip(),
        id=record.identifier("case_id", "knowedit"),
        target_true=record.first("ground_truth"),
        paraphrases=record.texts("rephrase_prompt") + record.texts("rephrase"),
        neighborhood=tuple(neighbors),
    )
    return EditCase((request,), questions=tuple(questions))


def _groups(record: Record, field: str) -> list[tuple[str, Record]]:
    """The prompts of every named group of a field, each as a record, with its group's name."""
    groups = record.nested(field, record.data.get(field) or {})
    return [
        (group, groups.nested(f"{group}[{index}]", item))
        for group in groups.data
        for index, item in enumerate(groups.items(group))
    ]


def _wikibigedit(record: Record, derived: bool) -> EditCase:
    prompt, subject = template(record, "update", record.text("subject"))
    target, reached = record.text("ans").strip(), record.answers("mhop_ans")
    questions = [Question("persona", text, (target,)) for text in record.texts("personas")]
    questions += [Question("multi_hop", text, reached) for text in record.texts("mhop") if reached]
    request = EditRequest(
        prompt=prompt,
        subject=subject,
        target_new=target,
        id=record.identifier("case_id", "wikibigedit"),
        relation=record.optional("relation"),
        paraphrases=record.texts("rephrase"),
        neighborhood=tuple(Neighbor(text, record.first("loc_ans")) for text in record.texts("loc")),
    )
    return EditCase((request,), questions=tuple(questions))


def _snake(name: str) -> str:
    return re.sub(r"\W+", "_", name.strip()).lower()


OWN = Shape(
    "nmke",
    "our own, with prompt, subject and target_new",
    frozenset({"prompt", "target_new"}),
    frozenset(OWN_FIELDS),
    _own,
    strict=True,
)
ZSRE = Shape(
    "zsre",
    "ZsRE as used by MEND and EasyEdit",
    frozenset({"src", "alt"}),
    frozenset({"case_id", "subject", "src", "alt", "answers", "rephrase", "loc", "loc_ans"}),
    _zsre,
)
KNOWEDIT = Shape(
    "knowedit",
    "KnowEdit, with locality and portability groups",
    frozenset({"locality", "portability"}),
    frozenset({*_FLAT, "rephrase", "locality", "portability"}),
    _knowedit,
)
WIKIBIGEDIT = Shape(
    "wikibigedit",
    "WikiBigEdit as published, with multi-hop questions",
    frozenset({"mhop", "personas", "update"}),
    frozenset(
        {
            "case_id",
            "subject",
            "relation",
            "update",
            "ans",
            "rephrase",
            "personas",
            "loc",
            "loc_ans",
            "mhop",
            "mhop_ans",
        }
    ),
    _wikibigedit,
)
EASYEDIT = Shape(
    "easyedit",
    "EasyEdit's flat records, WikiBigEdit and WISE among them",
    frozenset({"locality_prompt", "locality_ground_truth", "rephrase_prompt", "ground_truth"}),
    frozenset({*_FLAT, "locality_prompt", "locality_ground_truth", "ood_rephrase"}),
    _easyedit,
)
