"""Facts against the model that is to read them, before anything is written."""

from __future__ import annotations

from collections.abc import Sequence

from nmke.errors import NmkeError, RequestError
from nmke.models.load import EditableModel
from nmke.types import EditRequest

# Tokens of prompt and answer together that are edited: twice the longest fact of the known data sets (262 tokens,
# hallucinated biographies). Time grows with them, and memory: with a 135M model a fact of 30 tokens takes 8 seconds
# of one processor core, one of 490 tokens 33, and a prompt of 10,000 characters (2,010 tokens) minutes.
MOST_TOKENS = 512


def check_requests(model: EditableModel, requests: Sequence[EditRequest]) -> None:
    """Refuse requests that the model cannot read.

    Raises:
        RequestError: Names the edit.
    """
    limit = model.context_length
    seen: set[str] = set()
    for request in requests:
        if request.id in seen:
            raise RequestError(f"edit id {request.id!r} occurs twice; give every fact its own id")
        seen.add(request.id)
        others = [*request.paraphrases, *(neighbor.prompt for neighbor in request.neighborhood)]
        longest = _tokens(model, request, others)
        if limit is not None and longest > limit:
            raise RequestError(
                f"edit {request.id!r}: prompt {request.text[:60]!r} and target have {longest} tokens, "
                f"the model reads {limit}; shorten the prompt"
            )


def check_editable(model: EditableModel, requests: Sequence[EditRequest]) -> None:
    """Refuse requests that the model cannot read, or that are too long to be edited.

    Raises:
        RequestError: Names the edit.
    """
    check_requests(model, requests)
    for request in requests:
        length = _tokens(model, request)
        if length > MOST_TOKENS:
            raise RequestError(
                f"edit {request.id!r}: prompt {request.text[:60]!r} and target have {length} tokens, at most "
                f"{MOST_TOKENS} are edited; leave out what the fact does not need"
            )


def _tokens(model: EditableModel, request: EditRequest, others: Sequence[str] = ()) -> int:
    """Tokens of the longest of the prompts, with the target."""
    encoder = model.encoder
    try:
        encoder.subject_last_index(request.text, request.subject_end)
        target = encoder.encode_target(request.text, request.target_new)
        return max(len(encoder.encode(prompt)) for prompt in (request.text, *others)) + len(target)
    except NmkeError as error:
        raise RequestError(f"edit {request.id!r}: {error}") from error
