"""IKE: the new facts in front of the prompt; a control that changes no weight.

Source: Zheng et al. 2023, arXiv:2305.12740: the prompt is preceded by demonstrations of how a new fact is to be used,
and by the new fact itself, "New Fact: ... Prompt: ..."; demonstrations are the nearest of a corpus.
Differs: facts and demonstrations are the edits of the run. For a prompt, the nearest fact is put last and up to four
next nearest stand before it as demonstrations, answered. Nearness is the cosine of word counts weighed by rarity (the
paper uses a sentence encoder); a prompt that shares no word with any fact stays as it is.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import cast

import torch
from torch import Tensor

from nmke.editors.method import PROMPT, SIDE_MEMORY, Batch, Method, methods
from nmke.editors.pipeline import BatchResult, Stopwatch
from nmke.editors.side import SideMemory
from nmke.editors.training import Fit
from nmke.models.load import EditableModel
from nmke.models.tokens import TextEncoder

NAME, DEMONSTRATIONS, ROOM = "ike", 4, 1024


@dataclass(frozen=True)
class Facts:
    """Facts to put in front of prompts.

    Args:
        told: Prompt and answer of each, oldest first.
    """

    told: tuple[tuple[str, str], ...]

    @cached_property
    def _weights(self) -> dict[str, float]:
        seen = Counter(word for prompt, _ in self.told for word in set(_words(prompt)))
        return {word: math.log((1 + len(self.told)) / count) for word, count in seen.items()}

    def nearest(self, prompt: str) -> list[int]:
        """Facts that share a word with the prompt, the nearest last; the newer of equals is nearer."""
        asked = self._vector(prompt)
        near = [(_cosine(asked, self._vector(text)), index) for index, (text, _) in enumerate(self.told)]
        return [index for similarity, index in sorted(near) if similarity > 0][-DEMONSTRATIONS - 1 :]

    def in_front_of(self, prompt: str, demonstrations: int = DEMONSTRATIONS) -> str:
        """The text to put in front of a prompt, "" when no fact is near."""
        near = self.nearest(prompt)[-demonstrations - 1 :]
        if not near:
            return ""
        lines = [f"New Fact: {t} {a}\nPrompt: {t} {a}\n\n" for t, a in (self.told[i] for i in near[:-1])]
        text, answer = self.told[near[-1]]
        return "".join([*lines, f"New Fact: {text} {answer}\nPrompt: "])

    def _vector(self, prompt: str) -> dict[str, float]:
        return {w: n * self._weights[w] for w, n in Counter(_words(prompt)).items() if w in self._weights}


class TellingEncoder:
    """A text encoder that puts the facts in front of every prompt.

    Args:
        plain: The model's own encoder.
        facts: What to tell.
        room: Tokens that text in front and prompt may take together; demonstrations beyond it are left out.
    """

    def __init__(self, plain: TextEncoder, facts: Facts, room: int) -> None:
        self.plain, self.facts, self.room = plain, facts, room
        self.tokenizer, self.prefix_ids = plain.tokenizer, plain.prefix_ids
        self.adds_bos, self.pad_id = plain.adds_bos, plain.pad_id

    def encode(self, text: str) -> list[int]:
        """See `TextEncoder.encode`."""
        return self.plain.encode(self._front(text) + text)

    def encode_target(self, text: str, target: str) -> list[int]:
        """See `TextEncoder.encode_target`; what stands in front does not change it."""
        return self.plain.encode_target(text, target)

    def subject_last_index(self, text: str, end_char: int) -> int:
        """See `TextEncoder.subject_last_index`."""
        front = self._front(text)
        return self.plain.subject_last_index(front + text, len(front) + end_char)

    def _front(self, text: str) -> str:
        fronts = (self.facts.in_front_of(text, count) for count in range(DEMONSTRATIONS, -1, -1))
        return next((front for front in fronts if len(self.plain.encode(front + text)) <= self.room), "")


def compute(batch: Batch) -> BatchResult:
    """Remember the batch's facts; an earlier fact with the same prompt is replaced. See `Compute`."""
    clock = Stopwatch()
    new = {request.text: request.target_new for request in batch.requests}
    kept = [(text, answer) for text, answer in _read(batch.side).told if text not in new]
    side = SideMemory(NAME, {"facts": _as_tensor([*kept, *new.items()])})
    ended = Fit([0.0] * len(batch.requests), 0).as_targets()
    owners = tuple(range(len(batch.requests)))
    return BatchResult((), {}, ended, {}, owners, {}, clock.seconds, side)


@contextmanager
def recall(model: EditableModel, memory: SideMemory) -> Iterator[None]:
    """Every prompt is told the facts; see `Recall`."""
    plain, room = model.encoder, (model.context_length or 2 * ROOM) // 2
    telling = TellingEncoder(plain, _read(memory), min(room, ROOM))
    model.encoder = cast(TextEncoder, telling)  # it answers the same questions
    try:
        yield
    finally:
        model.encoder = plain


def _read(memory: SideMemory | None) -> Facts:
    if memory is None:
        return Facts(())
    text = bytes(memory.tensors["facts"].cpu().tolist()).decode()
    return Facts(tuple((prompt, answer) for prompt, answer in json.loads(text)))


def _as_tensor(told: Sequence[tuple[str, str]]) -> Tensor:
    return torch.tensor(list(json.dumps(list(told), ensure_ascii=False).encode()), dtype=torch.uint8)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def _cosine(first: dict[str, float], second: dict[str, float]) -> float:
    shared = sum(weight * second[word] for word, weight in first.items() if word in second)
    norms = math.sqrt(sum(w * w for w in first.values()) * sum(w * w for w in second.values()))
    return shared / norms if norms else 0.0


methods.register(
    NAME,
    Method(compute=compute, recall=recall, remembers=False),
    source="arXiv:2305.12740",
    summary="the new facts in front of the prompt, no weight changed",
    needs=(SIDE_MEMORY, PROMPT),
    doc=__doc__,
)
