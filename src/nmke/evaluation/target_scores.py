"""Teacher-forced scores of target tokens: argmax and log-probability, batched, logits only where needed."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from nmke.errors import RequestError
from nmke.models.load import EditableModel
from nmke.models.ranks import shared_out
from nmke.models.tokens import TokenBatch, length_buckets, pad_batch

TOKEN_BUDGET = 4096
MAX_LOGITS = 2**24
Side = Literal["left", "right"]
Pair = tuple[str, str]


@dataclass(frozen=True)
class TargetScore:
    """What the model thinks of one target behind one prompt.

    Args:
        predicted: Argmax token id at each target position, the target itself being fed (teacher forcing).
        target: The target's token ids.
        log_probs: Natural log-probability of each target token, computed in float32.
    """

    predicted: tuple[int, ...]
    target: tuple[int, ...]
    log_probs: tuple[float, ...]

    @property
    def accuracy(self) -> float:
        """Share of target tokens that are the argmax."""
        return sum(a == b for a, b in zip(self.predicted, self.target, strict=True)) / len(self.target)

    @property
    def mean_nll(self) -> float:
        """Mean negative log-probability per target token, in nats."""
        return -sum(self.log_probs) / len(self.log_probs)

    @property
    def log_prob(self) -> float:
        """Log-probability of the whole target, in nats."""
        return sum(self.log_probs)


@dataclass(frozen=True)
class TargetRow:
    """Token ids whose last `n_target` are to be scored; at least one id stands before them."""

    ids: tuple[int, ...]
    n_target: int

    @property
    def start(self) -> int:
        """Position whose logits predict the first target token."""
        return len(self.ids) - self.n_target - 1


def predictions(
    model: EditableModel, pairs: Sequence[Pair], token_budget: int = TOKEN_BUDGET, side: Side = "right"
) -> list[TargetScore]:
    """Argmax ids and log-probabilities of each pair's target tokens.

    Args:
        model: The model, edited or not.
        pairs: Prompt and target, in any order; equal pairs are run once. Which pairs share a batch depends
            on the set only, so that equal weights give equal bits.
        token_budget: Largest number of tokens in a batch, padding included.
        side: Padding side; the result does not depend on it.

    Returns:
        One score per pair, in the order given.

    Raises:
        RequestError: If prompt and target do not fit the model's context, or one of them has no token.
    """
    distinct = sorted(set(pairs))
    rows = [_row(model, prompt, target) for prompt, target in distinct]
    scores = dict(zip(distinct, score_rows(model, rows, token_budget, side), strict=True))
    return [scores[pair] for pair in pairs]


@torch.inference_mode()
def score_rows(
    model: EditableModel,
    rows: Sequence[TargetRow],
    token_budget: int = TOKEN_BUDGET,
    side: Side = "right",
) -> list[TargetScore]:
    """Scores of the target tokens of each row, in the order given."""
    buckets = [[(i, rows[i]) for i in bucket] for bucket in _buckets(model, rows, token_budget)]
    scores: dict[int, TargetScore] = {}
    for found in shared_out(model, _score_buckets, buckets, side):
        scores.update(found)
    return [scores[i] for i in range(len(rows))]


@torch.inference_mode()
def _score_buckets(
    model: EditableModel, buckets: Sequence[Sequence[tuple[int, TargetRow]]], side: Side
) -> Iterator[dict[int, TargetScore]]:
    """Scores of one batch after another, by the rows' indices."""
    for bucket in buckets:
        rows = [row for _, row in bucket]
        batch = pad_batch(
            [list(row.ids) for row in rows], model.encoder.pad_id, side=side, device=model.device
        )
        width = batch.input_ids.shape[1]
        starts = [row.start + (width - len(row.ids) if side == "left" else 0) for row in rows]
        positions = sorted(
            {p for row, start in zip(rows, starts, strict=True) for p in range(start, start + row.n_target)}
        )
        logits = _logits_at(model, batch, torch.tensor(positions, device=model.device))
        column = {position: index for index, position in enumerate(positions)}
        found: dict[int, TargetScore] = {}
        for place, ((index, row), start) in enumerate(zip(bucket, starts, strict=True)):
            first = column[start]
            target = row.ids[-row.n_target :]
            found[index] = _score(logits[place, first : first + len(target)], target)  # [targets d_vocab]
        yield found


@torch.inference_mode()
def next_token_scores(
    model: EditableModel,
    contexts: Sequence[tuple[int, ...]],
    options: Sequence[Sequence[int]],
    token_budget: int = TOKEN_BUDGET,
    side: Side = "right",
) -> list[list[tuple[float, bool]]]:
    """Log-probability of several next tokens behind each context, from one forward pass a context.

    Args:
        model: The model, edited or not.
        contexts: Token ids, distinct or not.
        options: For each context the tokens asked about.
        token_budget: Largest number of tokens in a batch.
        side: Padding side; the result does not depend on it.

    Returns:
        Per context and option the natural log-probability, and whether the token is the argmax.
    """
    found: dict[int, list[tuple[float, bool]]] = {}
    rows = [TargetRow((*context, 0), 1) for context in contexts]  # the last id only marks the place
    for bucket in _buckets(model, rows, token_budget):
        batch = pad_batch(
            [list(contexts[i]) for i in bucket], model.encoder.pad_id, side=side, device=model.device
        )
        columns = batch.last_index.tolist()
        positions = sorted(set(columns))
        logits = _logits_at(model, batch, torch.tensor(positions, device=model.device))
        for place, (i, column) in enumerate(zip(bucket, columns, strict=True)):
            scores = logits[place, positions.index(column)].float().log_softmax(dim=0)  # [d_vocab]
            best = int(scores.argmax())
            found[i] = [(float(scores[token]), token == best) for token in options[i]]
    return [found[i] for i in range(len(contexts))]


def _row(model: EditableModel, prompt: str, target: str) -> TargetRow:
    """Token ids of prompt and target."""
    before = model.encoder.encode(prompt)
    after = model.encoder.encode_target(prompt, target)
    length, longest = len(before) + len(after), model.context_length
    if longest is not None and length > longest:
        raise RequestError(
            f"prompt {prompt[:80]!r} and its target have {length} tokens, its context {longest}; shorten it"
        )
    return TargetRow((*before, *after), len(after))


def _buckets(model: EditableModel, rows: Sequence[TargetRow], token_budget: int) -> Iterator[list[int]]:
    """Indices of rows to run together: of like length, within the token budget and the bound on logits."""
    d_vocab = model.model.get_output_embeddings().weight.shape[0]
    for bucket in length_buckets([len(row.ids) for row in rows], token_budget):
        widest = max(len(rows[i].ids) for i in bucket) - min(rows[i].start for i in bucket)
        most = max(1, MAX_LOGITS // (widest * d_vocab))
        yield from (bucket[start : start + most] for start in range(0, len(bucket), most))


def _logits_at(model: EditableModel, batch: TokenBatch, positions: Tensor) -> Tensor:
    """Logits at the given positions only, [batch, positions, d_vocab].

    A model spread over devices moves `positions` to the wrong one, so there all logits are made and cut.
    """
    accepted = inspect.signature(model.model.forward).parameters
    inputs: dict[str, Any] = {name: value for name, value in batch.model_inputs.items() if name in accepted}
    if "use_cache" in accepted:
        inputs["use_cache"] = False
    spread = len(set(getattr(model.model, "hf_device_map", {}).values())) > 1
    if "logits_to_keep" in accepted and not spread:
        logits: Tensor = model.model(**inputs, logits_to_keep=positions).logits
        return logits
    return model.model(**inputs).logits[:, positions.tolist()]


def _score(logits: Tensor, target: Sequence[int]) -> TargetScore:
    """The score from the logits that predict the target, [targets, d_vocab]."""
    exact = logits.float()
    ids = torch.tensor(target, device=logits.device)
    chosen = exact.gather(1, ids[:, None])[:, 0] - exact.logsumexp(dim=1)  # [targets]
    return TargetScore(tuple(exact.argmax(dim=1).tolist()), tuple(target), tuple(chosen.tolist()))
