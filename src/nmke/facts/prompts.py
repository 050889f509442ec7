"""Where the subject stands in a prompt: `{France}`, `{}`, or spelled out once.

The rule, first match wins, when the subject is given: `{subject}` with exactly that subject; a single `{}`;
the subject spelled out once. When it is not given: a single `{...}` group, whose content is the subject.
All other braces are plain text, so code and JSON in a prompt are fine; only a literal `{}` cannot be
written, because templates use it for the subject.
"""

from __future__ import annotations

import re
import unicodedata

from nmke.errors import RequestError

SLOT = "{}"
_GROUP = re.compile(r"\{([^{}]+)\}")


def parse_prompt(prompt: str, subject: str | None = None) -> tuple[str, str]:
    """The prompt with `{}` in the subject's place, and the subject.

    Args:
        prompt: The sentence up to the answer, such as "The capital of {France} is".
        subject: What the fact is about; None reads it out of the braces. Compared exactly first, then in
            Unicode normal form NFC (both answers are then in NFC).

    Returns:
        Template with exactly one `{}`, and the subject without surrounding spaces.

    Raises:
        RequestError: If the subject is missing, stands twice unmarked, or several slots are marked.
    """
    template, found = _from_group(prompt) if subject is None else _with_subject(prompt, subject.strip())
    slots = template.count(SLOT)
    if slots != 1:
        raise RequestError(
            f"prompt {_short(prompt)} has {slots} places '{{}}' for the subject; "
            "keep one, and write no literal '{}'"
        )
    return template, found


def fill_subject(sentence: str, subject: str) -> str:
    """The sentence with a single `{}` or `{subject}` replaced by the subject, else unchanged."""
    for mark in (SLOT, "{" + subject + "}"):
        if sentence.count(mark) == 1:
            return sentence.replace(mark, subject)
    return sentence


def _from_group(prompt: str) -> tuple[str, str]:
    """Template and subject of a prompt that marks its subject as `{France}`."""
    groups = list(_GROUP.finditer(prompt))
    if len(groups) != 1:
        raise RequestError(
            f"prompt {_short(prompt)} names no subject: {len(groups)} '{{...}}' groups found; "
            "mark it once as in 'The capital of {France} is', or give the subject"
        )
    subject = groups[0].group(1).strip()
    if not subject:
        raise RequestError(f"prompt {_short(prompt)} marks an empty subject; write it inside the braces")
    return _cut(prompt, groups[0].start(), groups[0].end()), subject


def _with_subject(prompt: str, subject: str) -> tuple[str, str]:
    """Template and subject when the subject is known."""
    if not subject:
        raise RequestError(f"subject of prompt {_short(prompt)} is empty; name what the fact is about")
    for text, name in ((prompt, subject), (_nfc(prompt), _nfc(subject))):
        marked = "{" + name + "}"
        if marked in text:
            return _only(text, marked, prompt), name
        if SLOT in text:
            return text, name
        if name in text:
            return _only(text, name, prompt), name
    raise RequestError(_missing(prompt, subject))


def _only(text: str, part: str, prompt: str) -> str:
    """Text with its one `part` replaced by the slot."""
    at = text.find(part)
    if at != text.rfind(part):
        raise RequestError(
            f"subject {_short(part)} stands more than once in prompt {_short(prompt)}; "
            "mark the one that is meant with braces, as in '{France}'"
        )
    return _cut(text, at, at + len(part))


def _missing(prompt: str, subject: str) -> str:
    """The message for a subject that the prompt does not spell."""
    hint = ""
    if subject.casefold() in prompt.casefold():
        hint = " (it is there with other upper and lower case)"
    return (
        f"subject {_short(subject)} is not in prompt {_short(prompt)}{hint}; "
        "spell it as in the prompt, or put '{}' where it stands"
    )


def _cut(text: str, start: int, end: int) -> str:
    return text[:start] + SLOT + text[end:]


def _nfc(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def _short(text: str, length: int = 120) -> str:
    """The text quoted, its middle left out when it is long."""
    return repr(text if len(text) <= length else text[: length - 1] + "…")
