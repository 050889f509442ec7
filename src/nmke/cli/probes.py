"""A handful of prompts shown before and after: the edit itself, a paraphrase, a neighbour."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from nmke.models.load import EditableModel
    from nmke.types import EditRequest

Kind = Literal["edit", "paraphrase", "neighbour"]
ANSWER_TOKENS = 8


@dataclass(frozen=True)
class Probe:
    """One prompt to watch.

    Args:
        kind: What the prompt is to the edit.
        edit_id: The edit.
        prompt: Plain text.
        target_new: The edit's new answer, whose probability is watched.
    """

    kind: Kind
    edit_id: str
    prompt: str
    target_new: str


@dataclass(frozen=True)
class Answer:
    """What the model said to a probe.

    Args:
        text: Greedy continuation.
        p_new: Probability of the new answer.
    """

    text: str
    p_new: float


def choose_probes(requests: Sequence[EditRequest], facts: int = 3) -> list[Probe]:
    """Prompts of up to `facts` requests, spread over the list: each edit, one paraphrase, one neighbour.

    A single request shows two of each.
    """
    step = max(1, len(requests) // facts)
    chosen = requests[::step][:facts]
    each = 2 if len(requests) == 1 else 1
    probes = []
    for request in chosen:
        prompts: list[tuple[Kind, str]] = [("edit", request.text)]
        prompts += [("paraphrase", text) for text in request.paraphrases[:each]]
        prompts += [("neighbour", neighbor.prompt) for neighbor in request.neighborhood[:each]]
        probes += [Probe(kind, request.id, prompt, request.target_new) for kind, prompt in prompts]
    return probes


def answers(model: EditableModel, probes: Sequence[Probe]) -> list[Answer]:
    """What the model says now."""
    from nmke.evaluation.target_scores import predictions

    if not probes:
        return []
    texts = model.generate([probe.prompt for probe in probes], ANSWER_TOKENS, stop_at_newline=True)
    scores = predictions(model, [(probe.prompt, probe.target_new) for probe in probes])
    return [Answer(text.strip(), math.exp(score.log_prob)) for text, score in zip(texts, scores, strict=True)]


def probe_rows(
    probes: Sequence[Probe], before: Sequence[Answer], after: Sequence[Answer]
) -> list[tuple[str, ...]]:
    """Rows of the table: kind, prompt, before, after, p(new)."""
    return [
        (probe.kind, short(probe.prompt), old.text, new.text, f"{old.p_new:.2f}→{new.p_new:.2f}")
        for probe, old, new in zip(probes, before, after, strict=True)
    ]


def probes_json(
    probes: Sequence[Probe], before: Sequence[Answer], after: Sequence[Answer]
) -> list[dict[str, Any]]:
    """The same for `--json`."""
    return [
        {**asdict(probe), "before": asdict(old), "after": asdict(new)}
        for probe, old, new in zip(probes, before, after, strict=True)
    ]


def short(text: str, length: int = 90) -> str:
    """The end of a long text, which is what the answer hangs on."""
    return text if len(text) <= length else "…" + text[1 - length :]
