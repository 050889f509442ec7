"""Loss of the answers under plain forward passes with gradients: what methods that train something share.

The model's own parameters never require gradients and are never written: what is trained enters through hooks on
down-projections (`added_to_output`), so that the model is left as it was found.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from nmke.attribution.base import wide
from nmke.config import EditConfig
from nmke.editors.targets import Targets
from nmke.errors import NumericsError, RequestError
from nmke.models.layout import ModelLayout
from nmke.models.load import EditableModel
from nmke.models.prefix import AnchoredRows
from nmke.models.replay import in_rows, open_replay
from nmke.models.tokens import TokenBatch, length_buckets, pad_batch
from nmke.models.tracing import first_tensor, record_inputs, stop_after, with_first_tensor
from nmke.types import EditRequest

TOKEN_BUDGET = 1024  # tokens with gradients at once


@dataclass(frozen=True)
class AnswerRows:
    """Some requests' prompts with their answers, and where each answer token is predicted.

    Args:
        edits: Which requests of the batch, by index.
        batch: Prompt and answer without its last token, padded on the right.
        rows, columns: Row of `batch` and position that predicts each answer token, [reads].
        tokens: The answer tokens, [reads].
    """

    edits: tuple[int, ...]
    batch: TokenBatch
    rows: Int[Tensor, " reads"]
    columns: Int[Tensor, " reads"]
    tokens: Int[Tensor, " reads"]


def answer_rows(
    model: EditableModel, requests: Sequence[EditRequest], budget: int = TOKEN_BUDGET
) -> list[AnswerRows]:
    """The requests in groups of like length.

    Raises:
        RequestError: If prompt and answer are longer than the model reads.
    """
    ids, reads = [], []
    for request in requests:
        prompt, answer = (
            model.encoder.encode(request.text),
            model.encoder.encode_target(request.text, request.target_new),
        )
        limit = model.context_length
        if limit is not None and len(prompt) + len(answer) > limit:
            raise RequestError(
                f"edit {request.id!r}: prompt and answer have {len(prompt) + len(answer)} tokens, the model reads "
                f"{limit}; shorten the prompt"
            )
        ids.append([*prompt, *answer[:-1]])
        reads.append([(len(prompt) - 1 + offset, token) for offset, token in enumerate(answer)])
    return [_group(model, group, ids, reads) for group in length_buckets(list(map(len, ids)), budget)]


def _group(
    model: EditableModel, group: Sequence[int], ids: list[list[int]], reads: list[list[tuple[int, int]]]
) -> AnswerRows:
    batch = pad_batch([ids[i] for i in group], model.encoder.pad_id, device=model.device)
    flat = [(row, column, token) for row, i in enumerate(group) for column, token in reads[i]]
    rows, columns, tokens = torch.tensor(flat, device=model.device).T
    return AnswerRows(tuple(group), batch, rows, columns, tokens)


def _log_probabilities(
    layout: ModelLayout, hidden: Float[Tensor, "reads d_model"], rows: AnswerRows
) -> Float[Tensor, " reads"]:
    """Of every answer token, float32 or wider, from what the final norm is given there."""
    logits = layout.logit_map.apply(layout.unembedding(layout.final_norm(hidden)))
    return torch.log_softmax(wide(logits), dim=1).gather(1, rows.tokens[:, None])[:, 0]


class AnswerTails:
    """Losses of the answers when one layer's down-projection writes more where they are predicted.

    Nothing before a prompt's last token depends on it, and no block before the layer: both are run once, and only
    the answers' tokens in the blocks from the layer on are run again.

    Args:
        model: Its weights must not change meanwhile.
        rows: The prompts with their answers.
        layer: Whose down-projection writes more.

    `inputs` is what the down-projection receives at these tokens, [reads, d_mlp], float32 or wider.
    """

    def __init__(self, model: EditableModel, rows: AnswerRows, layer: int) -> None:
        self._layout, self._rows, self._layer = model.layout, rows, layer
        self.inputs = inputs_at_answers(model, rows, layer)
        reads = torch.bincount(rows.rows, minlength=len(rows.edits))
        anchors = rows.batch.last_index + 1 - reads
        self._replay = open_replay(model, AnchoredRows.of(rows.batch, anchors), [layer], "down_proj")
        self._columns = rows.columns - anchors[rows.rows]
        self._grid = (len(reads), int(reads.max()))

    @property
    def edits(self) -> tuple[int, ...]:
        """Which requests of the batch, by index."""
        return self._rows.edits

    def losses(self, values: Float[Tensor, "reads d_model"]) -> Float[Tensor, " edits"]:
        """As `edit_losses`, with `values` written beside what the layer writes."""
        grid = values.new_zeros(*self._grid, values.shape[1])
        delta = grid.index_put((self._rows.rows, self._columns), values)
        hidden = self._replay.run({self._layer: delta})[self._rows.rows, self._columns]
        return _mean_losses(_log_probabilities(self._layout, hidden, self._rows), self._rows)


@dataclass(frozen=True)
class Fit:
    """How the training of a batch ended, per request.

    Args:
        losses: Mean negative log-probability of the answer's tokens, nats.
        steps: Steps taken.
    """

    losses: list[float]
    steps: int

    def as_targets(self) -> Targets:
        """In the form that the record of a batch takes; there are no target values."""
        probabilities = tuple(math.exp(-loss) for loss in self.losses)
        return Targets(
            "block", (), {}, {}, tuple(self.losses), probabilities, (self.steps,) * len(self.losses)
        )


class HasEdits(Protocol):
    """Rows of some requests."""

    @property
    def edits(self) -> tuple[int, ...]:
        """Which requests of the batch, by index."""
        ...


Group = TypeVar("Group", bound=HasEdits)


def fit(
    groups: Sequence[Group],
    losses: Callable[[Group], Float[Tensor, " edits"]],
    optimizer: torch.optim.Optimizer,
    config: EditConfig,
    names: Sequence[str],
    *,
    penalty: Callable[[], Tensor] | None = None,
    after_step: Callable[[], None] = lambda: None,
) -> Fit:
    """Minimise the requests' mean loss over whatever `optimizer` holds.

    Args:
        groups: The requests' rows, in parts that are differentiated one after another.
        losses: The loss of each request of a group, which depends on the optimizer's tensors.
        optimizer: Steps once per pass over all groups.
        config: `steps` at most; ends once every request's loss is below `stop_loss`.
        names: Ids of the requests, for errors.
        penalty: Added to the loss, once per pass.
        after_step: Run behind every step, such as a clamp.

    Raises:
        NumericsError: If a loss is not finite; names the edit.
    """
    last = [math.inf] * len(names)
    for step in range(1, config.steps + 1):
        optimizer.zero_grad()
        for group in groups:
            each = losses(group)
            (each.sum() / len(names)).backward()
            for edit, loss in zip(group.edits, each.tolist(), strict=True):
                last[edit] = loss
        _check_losses(last, names, step)
        if all(loss < config.stop_loss for loss in last):
            return Fit(last, step)
        if penalty is not None:
            penalty().backward()
        optimizer.step()
        after_step()
    return Fit(last, config.steps)


def edit_losses(model: EditableModel, rows: AnswerRows) -> Float[Tensor, " edits"]:
    """Mean negative log-probability of each request's answer tokens, nats."""
    layout = model.layout
    with record_inputs({"norm": layout.final_norm}) as seen, stop_after(layout.final_norm):
        model.model(**model.inputs(rows.batch))
    return _mean_losses(_log_probabilities(layout, at_answers(rows, seen["norm"]), rows), rows)


def _mean_losses(log_p: Float[Tensor, " reads"], rows: AnswerRows) -> Float[Tensor, " edits"]:
    counts = torch.bincount(rows.rows, minlength=len(rows.edits)).to(log_p)
    return torch.zeros_like(counts).index_add(0, rows.rows, -log_p) / counts


@contextmanager
def added_to_output(changes: Mapping[nn.Module, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """Add to each module's output a function of its input, while the context is open."""

    def hook_for(change: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
        def hook(_module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            out = first_tensor(output)
            return with_first_tensor(output, out + change(args[0]).to(out.dtype))

        return hook

    handles = [module.register_forward_hook(hook_for(change)) for module, change in changes.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def at_answers(rows: AnswerRows, tensor: Tensor) -> Tensor:
    """What a module saw or wrote where the answer tokens are predicted, [reads, width]."""
    return in_rows(tensor, len(rows.edits))[rows.rows, rows.columns]


@torch.no_grad()
def inputs_at_answers(model: EditableModel, rows: AnswerRows, layer: int) -> Float[Tensor, "reads d_mlp"]:
    """What the layer's down-projection receives where the answer tokens are predicted, float32 or wider."""
    parts = model.layout.layers[layer]
    with record_inputs({"down": parts.down_proj}) as seen, stop_after(parts.block):
        model.model(**model.inputs(rows.batch))
    return wide(at_answers(rows, seen["down"]))


def trainable_type(model: EditableModel) -> torch.dtype:
    """The type that trained tensors are kept in: float32, or float64 for a float64 model."""
    return torch.promote_types(model.dtype, torch.float32)


def _check_losses(losses: Sequence[float], names: Sequence[str], step: int) -> None:
    for loss, name in zip(losses, names, strict=True):
        if not math.isfinite(loss):
            raise NumericsError(
                f"edit {name!r}: the loss is {loss} at step {step}; lower `lr` or load the model in float32"
            )
