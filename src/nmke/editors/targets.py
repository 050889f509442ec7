"""Target values: what the edited layers should write at the subject's last token so that the model says the answer.

Source: ROME, arXiv:2202.05262, eq. 4, with MEMIT's settings (arXiv:2210.07229, sec. 4.3): Adam on a vector
`delta` that starts at 0; loss = mean NLL of the target over the contexts + kl_factor · KL(before‖after) on
"{subject} is a" + weight_decay · ‖delta‖/‖h0‖²; stops below `stop_loss`; after each step ‖delta‖ is clipped
to clamp · ‖h0‖. z* = h0 + delta.
Differs: the KL is read at the prompt's last token, as the paper's text has it. Rows whose subject ends at
position 0 are left out (attention sink). Products of the replayed blocks may run in bfloat16 (see
`nmke.models.half_products`); delta, losses and all else stay as they are. All edits of a batch are optimised
together, each stops on its own and leaves the batch, and only what comes behind the subject in the layers
behind the edit is run again.
`joint` targets (ours): one delta per edited layer at its down-projection's output, optimised together; right
also where a norm stands between the MLP and the residual stream.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from nmke.attribution.base import wide
from nmke.config import EditConfig
from nmke.editors.rows import kl_row, prompt_rows
from nmke.errors import NumericsError, RequestError
from nmke.models.half_products import half_product_layout
from nmke.models.layout import ModelLayout
from nmke.models.load import EditableModel
from nmke.models.prefix import AnchoredRows
from nmke.models.ranks import shared_out
from nmke.models.replay import Replay, Site, first_replayed, open_replay
from nmke.models.tokens import length_buckets
from nmke.progress import Progress, Task, quiet, silent
from nmke.types import EditRequest

FOUND = 0.9  # probability of the target from which an edit needs no further round
SETTINGS = (  # all that the optimisation reads of `EditConfig`
    "steps", "rounds", "lr", "clamp", "weight_decay", "kl_factor", "stop_loss", "stop_argmax", "token_budget",
    "products",
)  # fmt: skip
COMPACT_BELOW = 0.8  # rows are dropped from the batch once fewer than this share is still being optimised
Read = tuple[int, int, int]  # row, column in the tail, token


@dataclass(frozen=True)
class Targets:
    """The result of the optimisation for a batch of edits.

    Args:
        site: Where the deltas are added.
        layers: The layers they are added at.
        deltas: Per layer, [edits, d_model].
        values: Per layer, h0 + delta, [edits, d_model].
        losses: Last loss of each edit, nats.
        probabilities: Probability of the target (geometric mean over tokens and contexts) at that loss.
        steps: Forward passes each edit took.
        seconds: Wall-clock time of the optimisation, as it was when the targets were sought.
    """

    site: Site
    layers: tuple[int, ...]
    deltas: dict[int, Float[Tensor, "edits d_model"]]
    values: dict[int, Float[Tensor, "edits d_model"]]
    losses: tuple[float, ...]
    probabilities: tuple[float, ...]
    steps: tuple[int, ...]
    seconds: float = 0.0


@dataclass(frozen=True)
class EditRows:
    """Rows of one edit and where its loss is read.

    Args:
        ids: Token ids per row; the last row is the KL prompt.
        anchors: Index of the subject's last token per row.
        reads: Every target token.
        held: The tokens of the answers that have to stay, a tuple for each fact.
        kl_column: Column in the tail of the KL prompt's last token.
    """

    ids: tuple[tuple[int, ...], ...]
    anchors: tuple[int, ...]
    reads: tuple[Read, ...]
    held: tuple[tuple[Read, ...], ...]
    kl_column: int

    @property
    def tokens(self) -> int:
        """Tokens of all tails: those that are run again at every step."""
        return sum(len(ids) - anchor for ids, anchor in zip(self.ids, self.anchors, strict=True))


def edit_rows(
    model: EditableModel, request: EditRequest, contexts: Sequence[str], held: Sequence[EditRequest] = ()
) -> EditRows:
    """Tokenise one request for the optimisation.

    Args:
        model: Its tokens are meant.
        request: What is edited.
        contexts: Prefixes, the first one empty.
        held: Facts about the same subject, whose answers have to stay.

    Raises:
        RequestError: If a prompt does not fit the model.
    """
    ids: list[tuple[int, ...]] = []
    anchors: list[int] = []
    reads: list[tuple[Read, ...]] = []
    for asked in (request, *held):
        target = model.encoder.encode_target(asked.text, asked.target_new)
        own: list[Read] = []
        for row in prompt_rows(model, asked, contexts):
            first = len(row.ids) - 1 - row.anchor
            own += [(len(ids), first + offset, token) for offset, token in enumerate(target)]
            ids.append((*row.ids, *target[:-1]))
            anchors.append(row.anchor)
        reads.append(tuple(own))
    longest, limit = max(map(len, ids)), model.context_length
    if limit is not None and longest > limit:
        raise RequestError(
            f"edit {request.id!r}: context, prompt and answer have {longest} tokens, the model reads {limit}; "
            "shorten the prompt"
        )
    kl = kl_row(model, request, contexts)
    ids.append(kl.ids)
    anchors.append(kl.anchor)
    return EditRows(tuple(ids), tuple(anchors), reads[0], tuple(reads[1:]), len(kl.ids) - 1 - kl.anchor)


def optimise_targets(
    model: EditableModel,
    requests: Sequence[EditRequest],
    contexts: Sequence[str],
    layers: Sequence[int],
    site: Site,
    config: EditConfig,
    progress: Progress = quiet,
    *,
    held: Sequence[EditRequest] = (),
) -> Targets:
    """Target values of a batch; the model is not changed.

    Args:
        model: The model as it is now.
        requests: The batch.
        contexts: Prefixes, the first one empty.
        layers: Where deltas live: the last edited layer (site "block"), or every edited layer ("down_proj").
        site: See `layers`.
        config: `SETTINGS` of it.
        progress: Told after every step.
        held: Earlier facts; the answers of those about a request's subject may not lose probability.

    Raises:
        NumericsError: If a loss is not finite; names the edit.
        RequestError: If a prompt does not fit the model.
    """
    begun = time.perf_counter()
    rows = _rows(model, requests, contexts, held)
    groups = length_buckets([r.tokens for r in rows], config.token_budget)
    named = [[(index, rows[index], requests[index].id) for index in group] for group in groups]
    found: dict[int, Optimised] = {}
    with progress.task("target values", total=len(requests)) as task:
        for group in shared_out(model, _optimise_groups, named, tuple(layers), site, config, task=task):
            found.update({each.index: each for each in group})
            mean = sum(each.probability for each in group) / len(group)
            task.advance(len(group), f"p = {mean:.2f}")
    done = [found[index] for index in range(len(requests))]
    return Targets(
        site,
        tuple(layers),
        {layer: torch.stack([e.delta[s] for e in done]) for s, layer in enumerate(layers)},
        {layer: torch.stack([(e.start + e.delta)[s] for e in done]) for s, layer in enumerate(layers)},
        tuple(e.loss for e in done),
        tuple(e.probability for e in done),
        tuple(e.steps for e in done),
        time.perf_counter() - begun,
    )


def _rows(
    model: EditableModel,
    requests: Sequence[EditRequest],
    contexts: Sequence[str],
    held: Sequence[EditRequest],
) -> list[EditRows]:
    """The rows of each request, with those of the held facts about its subject."""
    about: dict[str, list[EditRequest]] = {}
    for fact in held:
        about.setdefault(fact.subject_key, []).append(fact)
    return [edit_rows(model, one, contexts, about.get(one.subject_key, ())) for one in requests]


@dataclass(frozen=True)
class Optimised:
    """One edit's result.

    Args:
        index: Its place in the batch.
        start: What stood at the sites before, [sites, d_model].
        delta: What is to be added, [sites, d_model].
        loss: Last loss, nats.
        probability: Of the target at that loss.
        steps: Forward passes it took.
    """

    index: int
    start: Float[Tensor, "sites d_model"]
    delta: Float[Tensor, "sites d_model"]
    loss: float
    probability: float
    steps: int


def _optimise_groups(
    model: EditableModel,
    groups: Sequence[Sequence[tuple[int, EditRows, str]]],
    layers: Sequence[int],
    site: Site,
    config: EditConfig,
    task: Task = silent,
) -> Iterator[list[Optimised]]:
    """The edits of one group after another: the unit of work, see `nmke.models.ranks`."""
    layout = half_product_layout(model, config.products, first_replayed(layers, site))
    for group in groups:
        edits = [_Edit(index, rows, name) for index, rows, name in group]
        _optimise_group(model, edits, layers, site, config, task, layout)
        yield [Optimised(e.index, e.start, e.delta.detach(), e.loss, e.probability, e.steps) for e in edits]


class _Edit:
    """One edit while it is being optimised."""

    def __init__(self, index: int, rows: EditRows, name: str) -> None:
        self.index, self.rows, self.name = index, rows, name
        self.start = torch.empty(0)
        self.delta = torch.empty(0)
        self.loss, self.probability, self.steps = float("inf"), 0.0, 0
        self.said = 0  # steps in a row on which the answer was the argmax in every context
        self.kl_before = torch.empty(0)
        self.held_before = torch.empty(0)
        self.done = False


def _optimise_group(
    model: EditableModel,
    edits: list[_Edit],
    layers: Sequence[int],
    site: Site,
    config: EditConfig,
    task: Task,
    layout: ModelLayout | None,
) -> None:
    batch = _Batch(model, edits, open_replay(model, _join(edits), layers, site, layout))
    for edit, start in zip(edits, batch.reference_anchors(layers), strict=True):
        edit.start = start
        edit.delta = torch.zeros_like(start).requires_grad_()
    optimizer = torch.optim.Adam([edit.delta for edit in edits], lr=config.lr)
    last = config.rounds * config.steps
    for step in range(1, last + 1):
        losses = batch.losses(layers, config, first=step == 1)
        for edit, loss in zip(batch.edits, losses.tolist(), strict=True):
            if edit.done:
                continue
            edit.loss, edit.steps = loss, step
            if not math.isfinite(edit.loss):
                raise NumericsError(
                    f"edit {edit.name!r}: the target optimisation's loss is {edit.loss} at step {step}; "
                    "lower `lr` or load the model in float32"
                )
            enough = 0 < config.stop_argmax <= edit.said
            over = step == last or (step % config.steps == 0 and edit.probability >= FOUND)
            edit.done = edit.loss < config.stop_loss or enough or over
        mean = sum(edit.probability for edit in edits) / len(edits)
        task.advance(0, f"step {step} of {last}, p = {mean:.2f}")
        if all(edit.done for edit in batch.edits):
            return
        optimizer.zero_grad()
        torch.stack([x for e, x in zip(batch.edits, losses, strict=True) if not e.done]).sum().backward()
        for edit in edits:
            if edit.done:
                edit.delta.grad = None  # else Adam's momentum would go on moving it
        optimizer.step()
        _clip(
            [edit for edit in batch.edits if not edit.done], config.clamp * 2 ** ((step - 1) // config.steps)
        )
        batch = batch.without_done()


@torch.no_grad()
def _clip(edits: Sequence[_Edit], clamp: float) -> None:
    for edit in edits:
        limit = clamp * edit.start.norm(dim=-1, keepdim=True)
        norm = edit.delta.norm(dim=-1, keepdim=True)
        edit.delta.mul_((limit / norm.clamp(min=1e-30)).clamp(max=1.0))


def _join(edits: Sequence[_Edit]) -> AnchoredRows:
    return AnchoredRows(
        tuple(ids for edit in edits for ids in edit.rows.ids),
        tuple(anchor for edit in edits for anchor in edit.rows.anchors),
    )


class _Batch:
    """The edits being optimised, with the places in their rows where losses are read."""

    def __init__(self, model: EditableModel, edits: list[_Edit], replay: Replay) -> None:
        self.model, self.edits, self.replay = model, edits, replay
        counts = [len(edit.rows.ids) for edit in edits]
        self.starts = [sum(counts[:i]) for i in range(len(edits))]
        device = model.device
        self.owner = torch.repeat_interleave(torch.arange(len(edits)), torch.tensor(counts)).to(device)
        reads = [
            (start + row, column, token, edit)
            for edit, (start, e) in enumerate(zip(self.starts, edits, strict=True))
            for row, column, token in e.rows.reads
        ]
        self.read_rows, self.read_columns, self.tokens, self.read_owner = torch.tensor(reads, device=device).T
        held = [(start, reads) for start, e in zip(self.starts, edits, strict=True) for reads in e.rows.held]
        self.held_reads = torch.tensor(
            [
                (start + row, column, token, n)
                for n, (start, reads) in enumerate(held)
                for row, column, token in reads
            ],
            dtype=torch.long,
            device=device,
        ).reshape(-1, 4)
        self.held_owner = torch.tensor(
            [i for i, e in enumerate(edits) for _ in e.rows.held], dtype=torch.long, device=device
        )
        ends = [start + count - 1 for start, count in zip(self.starts, counts, strict=True)]
        self.kl_rows = torch.tensor(ends, device=device)
        self.kl_columns = torch.tensor([e.rows.kl_column for e in edits], device=device)

    def reference_anchors(self, layers: Sequence[int]) -> list[Tensor]:
        """What stood at the sites of each edit's reference row, [sites, d_model] float32 or wider."""
        stacked = wide(torch.stack([self.replay.anchors[layer] for layer in layers], dim=1))
        return [stacked[start].clone() for start in self.starts]

    def losses(self, layers: Sequence[int], config: EditConfig, *, first: bool) -> Tensor:
        """Loss of each edit in nats, [edits]; remembers target probabilities, and the KL's base at first."""
        delta = torch.stack([edit.delta for edit in self.edits])
        hidden = self.replay.run({layer: delta[:, s][self.owner] for s, layer in enumerate(layers)})
        log_p = self._log_probabilities(hidden[self.read_rows, self.read_columns])
        target = -log_p.gather(1, self.tokens[:, None])[:, 0]
        counts = torch.bincount(self.read_owner, minlength=len(self.edits)).to(target)
        nll = torch.zeros_like(counts).index_add(0, self.read_owner, target) / counts
        after = self._log_probabilities(hidden[self.kl_rows, self.kl_columns])
        held = self._held_losses(hidden) if len(self.held_owner) else nll.new_zeros(0)
        if first:
            for i, edit in enumerate(self.edits):
                edit.kl_before, edit.held_before = after[i].detach(), held[self.held_owner == i].detach()
        before = torch.stack([edit.kl_before for edit in self.edits])
        kl = (before.exp() * (before - after)).sum(dim=1)
        wrong = log_p.argmax(dim=1) != self.tokens
        misses = torch.bincount(self.read_owner[wrong], minlength=len(self.edits))
        for edit, missed in zip(self.edits, misses.tolist(), strict=True):
            edit.said = 0 if missed else edit.said + 1
        for edit, value in zip(self.edits, nll.tolist(), strict=True):
            edit.probability = math.exp(-value) if math.isfinite(value) else 0.0
        start = torch.stack([edit.start for edit in self.edits])
        weight = (delta.norm(dim=2) / start.norm(dim=2).pow(2)).mean(dim=1)
        loss = nll + config.kl_factor * kl + config.weight_decay * weight
        if not len(held):
            return loss
        lost = torch.relu(held - torch.cat([edit.held_before for edit in self.edits]))
        return loss.index_add(0, self.held_owner, lost)

    def _held_losses(self, hidden: Tensor) -> Tensor:
        """-log p of every answer that has to stay, the mean over its tokens and contexts, nats, [facts]."""
        rows, columns, tokens, fact = self.held_reads.T
        log_p = self._log_probabilities(hidden[rows, columns]).gather(1, tokens[:, None])[:, 0]
        counts = torch.bincount(fact, minlength=len(self.held_owner)).to(log_p)
        return -torch.zeros_like(counts).index_add(0, fact, log_p) / counts

    def _log_probabilities(self, hidden: Tensor) -> Tensor:
        layout = self.model.layout
        raw = layout.unembedding(layout.final_norm(hidden))
        return torch.log_softmax(wide(layout.logit_map.apply(raw)), 1).to(hidden.device)

    def without_done(self) -> _Batch:
        """The batch without finished edits, once enough of it is finished to be worth it."""
        active = [i for i, edit in enumerate(self.edits) if not edit.done]
        if len(active) > COMPACT_BELOW * len(self.edits):
            return self
        rows = [
            r for i in active for r in range(self.starts[i], self.starts[i] + len(self.edits[i].rows.ids))
        ]
        return _Batch(self.model, [self.edits[i] for i in active], self.replay.select(rows))
