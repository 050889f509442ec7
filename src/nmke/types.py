"""Frozen records that travel between modules.

Axes: `edits prompts contexts batch seq d_model d_mlp d_vocab rank`.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from jaxtyping import Bool, Float, Int
from torch import Tensor

from nmke.errors import RequestError

Keys = Float[Tensor, "edits d_mlp"]
Residuals = Float[Tensor, "edits d_model"]
Scores = Float[Tensor, "prompts d_mlp"]
Gram = Float[Tensor, "d_mlp d_mlp"]
Mask = Bool[Tensor, " d_mlp"]

Part = Literal["down", "gate", "up"]

SUBJECT_SLOT = "{}"
KEY_SEPARATOR = (
    "\x1f"  # between prompt and subject in a `fact_key`; neither holds it, since it counts as a space
)


class MatrixPlace(NamedTuple):
    """Which of a layer's MLP matrices: one that neurons read through, or the one they write through.

    Args:
        layer: Index of the decoder layer.
        part: "down" writes into the residual stream; "gate" is behind the activation, "up" multiplies it. Where
            there is one reading matrix only, it is "up".
    """

    layer: int
    part: Part = "down"

    @property
    def label(self) -> str:
        """For tables: the layer's number, with the part unless it is the down-projection."""
        return str(self.layer) if self.part == "down" else f"{self.layer} {self.part}"


@dataclass(frozen=True)
class Columns:
    """Columns of one matrix, in any order.

    Args:
        index: Which neurons, [touched] int32.
        values: Their columns, [rows, touched], in the model's own type; see `nmke.models.weights`.
    """

    index: Int[Tensor, " touched"]
    values: Float[Tensor, "rows touched"]


@dataclass(frozen=True)
class Neighbor:
    """A prompt whose answer must not change, with its true answer where known."""

    prompt: str
    answer: str | None = None


@dataclass(frozen=True)
class EditRequest:
    """One fact to write: `prompt` holds `{}` exactly once, where the subject goes.

    Args:
        prompt: Template such as "The capital of {} is"; every other brace is plain text.
        subject: What stands in the slot, as written in the sentence.
        target_new: The answer the model must give, without leading space.
        id: Stable name; derived from prompt, subject and target when empty.
        target_true: The old or true answer, used for measuring only.
        relation: Name of the relation, if the source has one.
        paraphrases: The same question in other words, whole sentences up to the answer.
        neighborhood: Prompts about other subjects whose answers must stay.

    Raises:
        RequestError: If the template has no slot or several, or subject or target is empty.
    """

    prompt: str
    subject: str
    target_new: str
    id: str = ""
    target_true: str | None = None
    relation: str | None = None
    paraphrases: tuple[str, ...] = ()
    neighborhood: tuple[Neighbor, ...] = ()

    def __post_init__(self) -> None:
        slots = self.prompt.count(SUBJECT_SLOT)
        if slots != 1:
            raise RequestError(
                f"prompt {self.prompt[:120]!r} has {slots} subject slots '{{}}'; "
                "write the prompt with exactly one '{}' where the subject stands"
            )
        if not self.subject.strip():
            raise RequestError(
                f"subject of prompt {self.prompt[:120]!r} is empty; name what the fact is about"
            )
        if not self.target_new.strip():
            raise RequestError(
                f"target_new of prompt {self.text[:120]!r} is empty; give the answer the model should learn"
            )
        if not self.id:
            content = "\x1f".join((self.prompt, self.subject, self.target_new))
            object.__setattr__(self, "id", "e" + hashlib.sha256(content.encode()).hexdigest()[:8])

    @property
    def text(self) -> str:
        """The whole sentence up to the answer."""
        before, _, after = self.prompt.partition(SUBJECT_SLOT)
        return before + self.subject + after

    @property
    def subject_end(self) -> int:
        """Offset in `text`, in characters, just behind the subject."""
        return self.prompt.index(SUBJECT_SLOT) + len(self.subject)

    @property
    def fact_key(self) -> str:
        """Identity of what is asked (prompt template and subject, case and spaces folded), whatever the answer.

        Two requests with the same key are edits of the same fact: the later one supersedes the earlier.
        """
        return f"{_folded(self.prompt)}{KEY_SEPARATOR}{self.subject_key}"

    @property
    def subject_key(self) -> str:
        """Identity of the subject, case and spaces folded; what stands behind the separator in `fact_key`."""
        return _folded(self.subject)


def _folded(text: str) -> str:
    return " ".join(text.split()).casefold()


@dataclass(frozen=True)
class Question:
    """A question whose answer follows from edits or must survive them.

    Args:
        kind: What it asks for, such as "multi_hop", "reversal", "conflict", "one_to_many", "reasoning".
        prompt: The whole text up to the answer.
        answers: Right answers after the edits, at least one; the first is the one fed under teacher forcing.
        rival: An answer that must be less likely than the first right one, where the source gives one.
    """

    kind: str
    prompt: str
    answers: tuple[str, ...]
    rival: str | None = None

    def __post_init__(self) -> None:
        if not self.prompt.strip() or not any(answer.strip() for answer in self.answers[:1]):
            raise RequestError(
                f"question {self.prompt[:120]!r} has prompt or first answer empty; give both, or leave it out"
            )


@dataclass(frozen=True)
class EditCase:
    """One record of a benchmark: facts to edit in this order, and what is asked about them together.

    Args:
        requests: At least one; a later one may take back or contradict an earlier one.
        id: Stable name; the first request's when empty.
        questions: Asked once all requests of the case are edited.
        generation_prompts: Openings about the subject, for fluency and consistency.
        attribute_prompts: Openings about other things of which `target_new` is true, for consistency.
    """

    requests: tuple[EditRequest, ...]
    id: str = ""
    questions: tuple[Question, ...] = ()
    generation_prompts: tuple[str, ...] = ()
    attribute_prompts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.requests:
            raise RequestError(f"case {self.id!r} holds no fact to edit; give at least one")
        if not self.id:
            object.__setattr__(self, "id", self.requests[0].id)

    @property
    def final_requests(self) -> tuple[EditRequest, ...]:
        """The facts that hold once all are edited: of several edits of one fact the last."""
        last = {request.fact_key: request for request in self.requests}
        return tuple(request for request in self.requests if last[request.fact_key] is request)


@dataclass(frozen=True)
class NeuronMask:
    """The neurons of one layer that an update may write into.

    Args:
        keep: True where the neuron's column may change.
        detail: Numbers behind the choice (entropies, asked ratios, counts), for the record.
    """

    keep: Mask
    detail: dict[str, float] = field(default_factory=dict)

    @property
    def ratio(self) -> float:
        """Share of neurons kept, in [0, 1]."""
        return float(self.keep.float().mean())

    @property
    def count(self) -> int:
        """How many neurons are kept."""
        return int(self.keep.sum())


@dataclass(frozen=True)
class LayerUpdate:
    """What one batch writes into one layer: ΔW = left @ right on the down-projection, or whole neurons anew.

    Args:
        layer: Index of the decoder layer.
        left: Float tensor [d_model, rank]; rank 0 where the down-projection's columns are replaced.
        right: Float tensor [rank, d_mlp]; exactly zero in the columns of neurons that stay untouched.
        mask: The neurons allowed to change, or None when all are.
        replaced: New content of neurons, by matrix: one neuron per row of the batch, in the order of its rows.
    """

    layer: int
    left: Float[Tensor, "d_model rank"]
    right: Float[Tensor, "rank d_mlp"]
    mask: NeuronMask | None = None
    replaced: Mapping[Part, Columns] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert "down" not in self.replaced or len(self.right) == 0, (
            "a down-projection is added to or replaced"
        )

    @property
    def delta(self) -> Float[Tensor, "d_model d_mlp"]:
        """The dense update of the down-projection [d_model, d_mlp], without what is replaced."""
        return self.left @ self.right

    @property
    def columns(self) -> Mask:
        """True for the neurons that this update changes, [d_mlp]."""
        changed = (self.right != 0).any(dim=0)
        for columns in self.replaced.values():
            changed[columns.index.long().to(changed.device)] = True
        return changed
