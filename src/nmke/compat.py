"""EasyEdit's way of asking for edits, read into ours: move a script over by changing the line that edits.

    records = easyedit(session, prompts=[...], subject=[...], target_new=[...], locality_inputs={...})

Both documented forms are read: parallel lists under the names of `BaseEditor.edit`, and a list of requests, each a
mapping of the same names in the singular. Locality becomes neighbourhood, portability becomes questions.
Source: EasyEdit's public documentation of `BaseEditor.edit` (zjunlp.gitbook.io/easyedit) and its README.
Differs: every edit stays in the session (EasyEdit's `sequential_edit=True`); undo it, or open another session, to
edit facts independently. The subject is always needed: given, or marked in the prompt as `{France}`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nmke.errors import RequestError, unknown_name
from nmke.events import EditRecord
from nmke.facts.plain_shapes import KNOWEDIT
from nmke.facts.prompts import parse_prompt
from nmke.facts.record import Record
from nmke.progress import Progress, quiet
from nmke.session import EditSession
from nmke.types import EditCase

# EasyEdit's names, plural and singular, and the field of a record that each becomes.
FIELDS = {
    "prompts": "prompt",
    "prompt": "prompt",
    "subject": "subject",
    "target_new": "target_new",
    "ground_truth": "ground_truth",
    "rephrase_prompts": "rephrase_prompt",
    "rephrase_prompt": "rephrase_prompt",
    "locality_inputs": "locality",
    "locality": "locality",
    "portability_inputs": "portability",
    "portability": "portability",
    "case_id": "case_id",
}
GROUPED = ("locality", "portability")
NO_ANSWER = "<|endoftext|>"  # what EasyEdit's documentation puts where no true answer is known


def read_easyedit(requests: Sequence[Mapping[str, Any]] | None = None, **lists: Any) -> tuple[EditCase, ...]:
    """EasyEdit's requests as cases of ours.

    Args:
        requests: A list of mappings, one a fact: `prompt`, `subject`, `target_new`, and as far as they are known
            `ground_truth`, `rephrase_prompt`, `locality` and `portability`, each of these a mapping from a
            group's name to `{"prompt": ..., "ground_truth": ...}` with a text or a list of texts.
        lists: Instead of `requests`, the arguments of `BaseEditor.edit`: `prompts`, `subject`, `target_new`,
            `ground_truth`, `rephrase_prompts`, `locality_inputs`, `portability_inputs`, each a list with one entry
            a fact (a single text stands for a list of one).

    Returns:
        One case a fact, in order. Its `requests[0]` holds paraphrases and neighbourhood, its `questions`
        the portability prompts under their group's name.

    Raises:
        RequestError: If a name is unknown, lists differ in length, a subject is missing, or a text is malformed.
    """
    if (requests is None) == (not lists):
        raise RequestError(
            "EasyEdit's request was asked for with both or neither of a list of requests and lists of fields; "
            "give one of them"
        )
    rows = _from_lists(lists) if requests is None else [_renamed(request) for request in requests]
    return tuple(_case(row, number) for number, row in enumerate(rows, start=1))


def easyedit(
    session: EditSession,
    requests: Sequence[Mapping[str, Any]] | None = None,
    *,
    progress: Progress = quiet,
    **lists: Any,
) -> list[EditRecord]:
    """Edit what an EasyEdit call asks for; the session's model is changed.

    Args:
        session: An open run; its settings say how to edit and how many facts at once.
        requests: See `read_easyedit`.
        progress: Told about each stage.
        lists: See `read_easyedit`.

    Returns:
        One record a fact, in order, with status and probabilities.

    Raises:
        RequestError: As `read_easyedit` and `EditSession.edit_many`; nothing is written then.
    """
    cases = read_easyedit(requests, **lists)
    asked = [request for case in cases for request in case.requests]
    return [record for report in session.edit_many(asked, progress=progress) for record in report.records]


def _field(name: str) -> str:
    """The record's field for one of EasyEdit's names."""
    if name not in FIELDS:
        raise RequestError(unknown_name("field of an EasyEdit request", name, FIELDS))
    return FIELDS[name]


def _renamed(request: Mapping[str, Any]) -> dict[str, Any]:
    """One request as a record, its groups as lists of prompt and answer."""
    if not isinstance(request, Mapping):
        raise RequestError(
            f"an EasyEdit request is a mapping, {type(request).__name__} found; give named fields"
        )
    row = {_field(name): value for name, value in request.items() if value is not None}
    for field in GROUPED:
        row[field] = {group: _items(field, group, held) for group, held in _groups(row.get(field), field)}
    return row


def _from_lists(lists: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Parallel lists as one record a fact."""
    given = {_field(name): value for name, value in lists.items() if value is not None}
    plain = {field: _listed(value) for field, value in given.items() if field not in GROUPED}
    length = len(plain.get("prompt", ()))
    for field, values in plain.items():
        _same_length(field, values, length)
    grouped = {
        field: {
            group: _columns(field, group, held, length) for group, held in _groups(given.get(field), field)
        }
        for field in GROUPED
    }
    return [
        {field: values[i] for field, values in plain.items()}
        | {field: {group: items[i] for group, items in groups.items()} for field, groups in grouped.items()}
        for i in range(length)
    ]


def _groups(value: Any, field: str) -> list[tuple[str, Mapping[str, Any]]]:
    """Name and content of every group of locality or portability inputs."""
    if value is None:
        return []
    if not isinstance(value, Mapping) or not all(isinstance(held, Mapping) for held in value.values()):
        raise RequestError(
            f"EasyEdit's {field} inputs are no mapping of groups; "
            'write {"neighborhood": {"prompt": [...], "ground_truth": [...]}}'
        )
    return list(value.items())


def _columns(field: str, group: str, held: Mapping[str, Any], length: int) -> list[list[dict[str, Any]]]:
    """A group's lists as the items of each fact; a fact's entry may be a text or a list of texts."""
    parts = {
        name: _listed(held.get(name)) for name in ("prompt", "ground_truth") if held.get(name) is not None
    }
    for name, values in parts.items():
        _same_length(f"{field} {group!r} {name}", values, length)
    return [_items(field, group, {name: values[i] for name, values in parts.items()}) for i in range(length)]


def _items(field: str, group: str, held: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One fact's share of a group: a prompt with its answer, or several of them."""
    prompts, answers = held.get("prompt"), held.get("ground_truth")
    if prompts is None:
        return []
    if isinstance(prompts, str):
        return [{"prompt": prompts, "ground_truth": answers}]
    texts = list(prompts)
    listed = [None] * len(texts) if answers is None else _listed(answers)
    _same_length(f"{field} {group!r} ground_truth", listed, len(texts))
    return [{"prompt": text, "ground_truth": answer} for text, answer in zip(texts, listed, strict=True)]


def _same_length(what: str, values: Sequence[Any], length: int) -> None:
    if len(values) != length:
        raise RequestError(
            f"EasyEdit's {what} has {len(values)} entries for {length} prompts; give one entry a prompt"
        )


def _listed(value: Any) -> list[Any]:
    return [value] if isinstance(value, str) else list(value)


def _case(row: dict[str, Any], number: int) -> EditCase:
    """One record as a case; a subject that is marked in the prompt need not be named."""
    if "subject" not in row and isinstance(row.get("prompt"), str):
        row["prompt"], row["subject"] = parse_prompt(row["prompt"])
    if row.get("ground_truth") == NO_ANSWER:
        del row["ground_truth"]
    return KNOWEDIT.convert(Record(row, "EasyEdit request", number), False)
