"""Perplexity on held-out text."""

from __future__ import annotations

import math
from collections.abc import Iterable

from nmke.errors import NumericsError, RequestError
from nmke.evaluation.target_scores import TOKEN_BUDGET, TargetRow, score_rows
from nmke.models.load import EditableModel

WINDOW = 512


def perplexity(
    model: EditableModel,
    texts: Iterable[str],
    *,
    window: int = WINDOW,
    max_tokens: int | None = None,
    token_budget: int = TOKEN_BUDGET,
) -> float:
    """Token-weighted perplexity: exp of the mean negative log-probability over every scored token.

    Args:
        model: The model, edited or not.
        texts: Held-out texts; each is cut into windows of its own.
        window: Tokens in a window. Windows do not overlap, and each begins with BOS where the tokenizer
            sets one; without BOS a window's first token is context only.
        max_tokens: Stop after about this many tokens; None takes all.
        token_budget: Largest number of tokens in a batch.

    Returns:
        A number of at least 1.

    Raises:
        RequestError: If the texts hold no token to score.
        NumericsError: If the loss is not finite.
    """
    rows = text_windows(model, texts, window, max_tokens)
    log_probs = [value for score in score_rows(model, rows, token_budget) for value in score.log_probs]
    if not log_probs:
        raise RequestError("the texts for perplexity hold no token to score; give longer texts")
    mean = -math.fsum(log_probs) / len(log_probs)
    if not math.isfinite(mean):
        raise NumericsError(f"the mean loss over {len(log_probs)} tokens is {mean}; the weights are damaged")
    return math.exp(min(mean, 700.0))


def text_windows(
    model: EditableModel, texts: Iterable[str], window: int = WINDOW, max_tokens: int | None = None
) -> list[TargetRow]:
    """The windows of the texts as rows whose every token with a token before it is scored."""
    start = tuple(model.encoder.prefix_ids)
    size = max(2, min(window, model.context_length or window) - len(start))
    rows: list[TargetRow] = []
    total = 0
    for text in filter(str.strip, texts):
        ids = tuple(model.encoder.encode(text))[len(start) :]
        for begin in range(0, len(ids), size):
            piece = (*start, *ids[begin : begin + size])
            if len(piece) > max(len(start), 1):
                rows.append(TargetRow(piece, len(piece) - max(len(start), 1)))
                total += len(piece)
            if max_tokens is not None and total >= max_tokens:
                return rows
    return rows
