"""Token rows of a batch of requests: every context times every prompt, with the subject's last token as anchor.

Position 0 is an attention sink in models without BOS: its hidden state hardly depends on the token. A row
whose subject's last token stands there is left out; the rows with a context in front remain.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nmke.errors import RequestError
from nmke.models.load import EditableModel
from nmke.types import EditRequest

KL_SUFFIX = " is a"


@dataclass(frozen=True)
class PromptRow:
    """One tokenised prompt.

    Args:
        ids: Token ids.
        anchor: Index of the subject's last token.
        bare: True when no context stands in front.
    """

    ids: tuple[int, ...]
    anchor: int
    bare: bool


def prompt_rows(model: EditableModel, request: EditRequest, contexts: Sequence[str]) -> list[PromptRow]:
    """The request's prompt behind each context, without rows whose anchor is position 0.

    Raises:
        RequestError: If the prompt is longer than the model can read, or no row is left.
    """
    rows = [_row(model, context, request.text, request.subject_end) for context in contexts]
    kept = [row for row in rows if row.anchor > 0]
    if not kept:
        raise RequestError(
            f"edit {request.id!r}: the subject {request.subject!r} is the model's first token in every context; "
            "put a word in front of it in the prompt"
        )
    return kept


def kl_row(model: EditableModel, request: EditRequest, contexts: Sequence[str]) -> PromptRow:
    """The prompt "{subject} is a", behind the first context that moves the subject off position 0."""
    text, end = request.subject + KL_SUFFIX, len(request.subject)
    rows = (_row(model, context, text, end) for context in contexts)
    return next((row for row in rows if row.anchor > 0), _row(model, contexts[0], text, end))


def _row(model: EditableModel, context: str, text: str, subject_end: int) -> PromptRow:
    whole = context + text
    ids = model.encoder.encode(whole)
    limit = model.context_length
    if limit is not None and len(ids) > limit:
        raise RequestError(
            f"prompt {text[:60]!r}... has {len(ids)} tokens, the model reads {limit}; shorten the prompt"
        )
    return PromptRow(
        tuple(ids), model.encoder.subject_last_index(whole, len(context) + subject_end), not context
    )
