"""Checks that one would make of an edit: the same fact in other words, and the same question about others.

The wordings are made by rule, the other subjects come from our own facts or from the model itself. They are
suggestions for people to look at, not a measurement.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from nmke.facts import bundled_facts
from nmke.models.load import EditableModel

NEIGHBOURS = 3
LIST_TOKENS = 32
LONGEST_NAME = 40
_ATTRIBUTE = re.compile(r"(?P<lead>The )(?P<what>[^{}]+?) of \{\}(?P<verb> is| was)$")


@dataclass(frozen=True)
class Suggestions:
    """Prompts to check an edit with.

    Args:
        paraphrases: Must give the new answer too.
        neighbours: Must answer as before.
    """

    paraphrases: tuple[str, ...]
    neighbours: tuple[str, ...]


def suggest(model: EditableModel, template: str, subject: str) -> Suggestions:
    """Checks for the fact that a prompt template asks about a subject."""
    others = other_subjects(model, template, subject)
    return Suggestions(paraphrase(template, subject), tuple(template.replace("{}", name) for name in others))


def paraphrase(template: str, subject: str) -> tuple[str, ...]:
    """The same sentence in other words: by its grammar where that is known, else with something in front."""
    template = template.rstrip()
    text = template.replace("{}", subject)
    found = _ATTRIBUTE.match(template)
    made = [f"I have read about {subject}. {text}", f"It is well known: {text}"]
    if found is not None:
        what, verb = found["what"], found["verb"].strip()
        made = [f"{subject}'s {what} {verb}", f"What {verb} the {what} of {subject}? It {verb}", made[0]]
    return tuple(made)


def other_subjects(model: EditableModel, template: str, subject: str, count: int = NEIGHBOURS) -> list[str]:
    """Names that could stand in the subject's place: of our facts with that prompt, else as the model lists them."""
    known = [fact.subject for fact in bundled_facts() if fact.prompt == template and fact.subject != subject]
    if len(known) >= count:
        return known[:count]
    listed = model.generate([f"A list of similar names: {subject},"], LIST_TOKENS, stop_at_newline=True)[0]
    found = dict.fromkeys(known)
    for part in re.split(r"[,;]", listed)[:-1]:  # the last one may be cut off
        name = re.sub(r"^(and|or) ", "", part.strip()).strip(" .\"'")
        if name and len(name) <= LONGEST_NAME and name.casefold() != subject.casefold() and "{" not in name:
            found[name] = None
    return list(found)[:count]
