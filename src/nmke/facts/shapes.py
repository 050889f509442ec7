"""The record shapes we know, recognised by their fields, each turned into an `EditRequest`.

Our own shape is strict: an unknown field or a fact that cannot be edited is an error. In the published data
sets such a fact is skipped and counted in a note, and fields we do not use are listed in a note.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nmke.errors import ConfigError, RequestError, unknown_name
from nmke.facts.prompts import fill_subject, parse_prompt
from nmke.facts.record import Record
from nmke.types import EditRequest, Neighbor


@dataclass(frozen=True)
class Shape:
    """One way to write a record.

    Args:
        name: Short name, printed as the guess.
        summary: What it is, for messages.
        signs: Fields of which one marks the shape.
        used: Fields that are read.
        convert: Record and `derived` to a request.
        strict: Refuse unknown fields and facts that cannot be edited.
    """

    name: str
    summary: str
    signs: frozenset[str]
    used: frozenset[str]
    convert: Callable[[Record, bool], EditRequest]
    strict: bool = False


def _own(record: Record, derived: bool) -> EditRequest:
    record.closed(OWN_FIELDS)
    template, subject = _template(record, "prompt", record.optional("subject"))
    return EditRequest(
        prompt=template,
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


def _neighbor(record: Record, index: int, item: Any) -> Neighbor:
    name = f"neighborhood[{index}]"
    if isinstance(item, str):
        return Neighbor(record.checked(name, item))
    nested = record.nested(name, item)
    nested.closed(("prompt", "answer"))
    return Neighbor(nested.text("prompt"), nested.optional("answer"))


def _counterfact(record: Record, derived: bool) -> EditRequest:
    rewrite = record.nested("requested_rewrite", record.data.get("requested_rewrite"))
    template, subject = _template(rewrite, "prompt", rewrite.text("subject"))
    target_true = _string(rewrite, "target_true")
    paraphrases, neighbors = record.texts("paraphrase_prompts"), record.texts("neighborhood_prompts")
    if derived:
        paraphrases += record.texts("paraphrase_prompts_rebuilt")
        neighbors += record.texts("neighborhood_prompts_pool")
    return EditRequest(
        prompt=template,
        subject=subject,
        target_new=_string(rewrite, "target_new").strip(),
        id=record.identifier("case_id", "counterfact"),
        target_true=target_true.strip(),
        relation=rewrite.optional("relation_id"),
        paraphrases=paraphrases,
        neighborhood=tuple(Neighbor(prompt, target_true.strip()) for prompt in neighbors),
    )


def _string(record: Record, field: str) -> str:
    """A target written as {"str": "Paris", "id": "Q90"} or plainly."""
    value = record.data.get(field)
    return record.nested(field, value).text("str") if isinstance(value, dict) else record.text(field)


def _zsre(record: Record, derived: bool) -> EditRequest:
    template, subject = _template(record, "src", record.text("subject"))
    return EditRequest(
        prompt=template,
        subject=subject,
        target_new=record.text("alt").strip(),
        id=record.identifier("case_id", "zsre"),
        target_true=record.first("answers"),
        paraphrases=record.texts("rephrase"),
        neighborhood=tuple(Neighbor(prompt, record.first("loc_ans")) for prompt in record.texts("loc")),
    )


def _easyedit(record: Record, derived: bool) -> EditRequest:
    template, subject = _template(record, "prompt", record.text("subject"))
    answer = record.first("locality_ground_truth")
    return EditRequest(
        prompt=template,
        subject=subject,
        target_new=record.text("target_new").strip(),
        id=record.identifier("case_id", "easyedit"),
        target_true=record.first("ground_truth"),
        paraphrases=record.texts("rephrase_prompt"),
        neighborhood=tuple(Neighbor(prompt, answer) for prompt in record.texts("locality_prompt")),
    )


def _knowedit(record: Record, derived: bool) -> EditRequest:
    template, subject = _template(record, "prompt", record.text("subject"))
    neighbors: list[Neighbor] = []
    groups = record.nested("locality", record.data.get("locality") or {})
    for group in groups.data:
        for index, item in enumerate(groups.items(group)):
            nested = groups.nested(f"{group}[{index}]", item)
            neighbors.append(Neighbor(nested.text("prompt"), nested.first("ground_truth")))
    return EditRequest(
        prompt=template,
        subject=subject,
        target_new=record.text("target_new").strip(),
        id=record.identifier("case_id", "knowedit"),
        target_true=record.first("ground_truth"),
        paraphrases=record.texts("rephrase_prompt") + record.texts("rephrase"),
        neighborhood=tuple(neighbors),
    )


def _template(record: Record, field: str, subject: str | None) -> tuple[str, str]:
    """Template and subject of the record's prompt, or the error that names the field."""
    prompt = record.text(field)
    try:
        return parse_prompt(prompt, subject)
    except RequestError as error:
        raise record.unusable(field, str(error)) from error


OWN_FIELDS = (
    "id", "prompt", "subject", "target_new", "target_true", "relation", "paraphrases", "neighborhood",
)  # fmt: skip
_FLAT = ("case_id", "prompt", "subject", "target_new", "ground_truth", "rephrase_prompt")

# Looked through in this order; our own comes last, because its fields are a part of the others'.
SHAPES = (
    Shape(
        "counterfact",
        "CounterFact as published with ROME",
        frozenset({"requested_rewrite"}),
        frozenset({"case_id", "requested_rewrite", "paraphrase_prompts", "neighborhood_prompts"}),
        _counterfact,
    ),
    Shape(
        "zsre",
        "ZsRE as used by MEND and EasyEdit",
        frozenset({"src", "alt"}),
        frozenset({"case_id", "subject", "src", "alt", "answers", "rephrase", "loc", "loc_ans"}),
        _zsre,
    ),
    Shape(
        "knowedit",
        "KnowEdit, with locality and portability groups",
        frozenset({"locality", "portability"}),
        frozenset({*_FLAT, "rephrase", "locality"}),
        _knowedit,
    ),
    Shape(
        "easyedit",
        "EasyEdit's flat records, WikiBigEdit and WISE among them",
        frozenset({"locality_prompt", "locality_ground_truth", "rephrase_prompt", "ground_truth"}),
        frozenset({*_FLAT, "locality_prompt", "locality_ground_truth"}),
        _easyedit,
    ),
    Shape(
        "nmke",
        "our own, with prompt, subject and target_new",
        frozenset({"prompt", "target_new"}),
        frozenset(OWN_FIELDS),
        _own,
        strict=True,
    ),
)


def find_shape(record: Record, name: str | None = None) -> Shape:
    """The shape asked for by name, or the one whose fields the record has.

    Raises:
        ConfigError: If the name is unknown.
        RequestError: If no shape fits the record.
    """
    if name is not None:
        for shape in SHAPES:
            if shape.name == name:
                return shape
        raise ConfigError(unknown_name("facts shape", name, [shape.name for shape in SHAPES]))
    for shape in SHAPES:
        if shape.signs & record.data.keys():
            return shape
    stray = next((name for name in record.data if name not in OWN_FIELDS), "prompt")
    hint = unknown_name("field", stray[:40], OWN_FIELDS)
    raise record.error(stray[:40], f"no known shape of record; ours needs 'prompt' and 'target_new'; {hint}")
