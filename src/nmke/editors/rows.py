"""Token rows of a batch of requests: every context times every prompt, with the subject's last token as anchor.

Position 0 is an attention sink in models without BOS: what is written there is lost a few layers later, and all that
comes behind looks at it. Behind some first tokens the next position is another one, with nearly the same state ("Phil
Jackson" in SmolLM2). A row whose subject's last token is a sink is left out; the rows with a context in front
remain, and a second request, whose subject is longer by one word, carries the fact for the bare prompt ("Japan uses"
for "Japan").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import cosine_similarity

from nmke.errors import RequestError
from nmke.models.load import EditableModel
from nmke.models.replay import in_rows
from nmke.models.tokens import pad_batch
from nmke.models.tracing import record_outputs, stop_after
from nmke.types import EditRequest

KL_SUFFIX = " is a"
SINK_COSINE = 0.95  # of states in the middle of the model; sinks of SmolLM2 reach .998, other tokens .7
FARTHEST_SINK = 3  # position; sinks besides position 0 were seen at position 1 only


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


@dataclass(frozen=True)
class BareRequest(EditRequest):
    """A request that is written for its bare prompt only, without contexts in front."""


def prompt_rows(model: EditableModel, request: EditRequest, contexts: Sequence[str]) -> list[PromptRow]:
    """The request's prompt behind each context, without rows whose anchor is an attention sink.

    Raises:
        RequestError: If the prompt is longer than the model can read, or no row is left.
    """
    used = contexts[:1] if isinstance(request, BareRequest) else contexts
    rows = [_row(model, context, request.text, request.subject_end) for context in used]
    kept = [row for row in rows if not _sinks(model, row)]
    if not kept:
        raise RequestError(
            f"edit {request.id!r}: the subject {request.subject!r} is the model's first token in every context; "
            "put a word in front of it in the prompt"
        )
    return kept


def with_second_anchors(
    model: EditableModel, requests: Sequence[EditRequest]
) -> tuple[tuple[EditRequest, ...], tuple[int, ...]]:
    """The requests, followed by one with a longer subject for each whose bare prompt has its anchor at a sink.

    Returns:
        Requests, and for each the index of the request it belongs to.
    """
    found, owners = list(requests), list(range(len(requests)))
    for index, request in enumerate(requests):
        longer = _longer_subject(model, request)
        if longer is not None:
            found.append(longer)
            owners.append(index)
    return tuple(found), tuple(owners)


def _longer_subject(model: EditableModel, request: EditRequest) -> BareRequest | None:
    if not _sinks(model, _row(model, "", request.text, request.subject_end)):
        return None
    before, _, after = request.prompt.partition("{}")
    for end in range(1, len(after) + 1):
        at_word_end = end == len(after) or after[end].isspace()
        if at_word_end and not _sinks(model, _row(model, "", request.text, request.subject_end + end)):
            subject = request.subject + after[:end]
            template = f"{before}{{}}{after[end:]}"
            return BareRequest(template, subject, request.target_new, id=f"{request.id}+")
    return None


def kl_row(model: EditableModel, request: EditRequest, contexts: Sequence[str]) -> PromptRow:
    """The prompt "{subject} is a", behind the first context that moves the subject off a sink."""
    text, end = request.subject + KL_SUFFIX, len(request.subject)
    rows = (_row(model, context, text, end) for context in contexts)
    return next((row for row in rows if not _sinks(model, row)), _row(model, contexts[0], text, end))


@torch.no_grad()
def _sinks(model: EditableModel, row: PromptRow) -> bool:
    """Whether the anchor is an attention sink: position 0, or near it with the same state as position 0."""
    if row.anchor == 0 or not row.bare or row.anchor > FARTHEST_SINK:
        return row.anchor == 0
    ids = row.ids[: row.anchor + 1]
    if ids not in model.sinks:
        middle = model.layout.layers[model.layout.n_layers // 2].block
        batch = pad_batch([ids], model.encoder.pad_id)
        with record_outputs({0: middle}) as found, stop_after(middle):
            model.model(**model.inputs(batch))
        state = in_rows(found[0], 1)[0].float()
        model.sinks[ids] = float(cosine_similarity(state[row.anchor], state[0], dim=0)) > SINK_COSINE
    return model.sinks[ids]


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
