"""Every stage of an edit on one model: its time, its floor, and the literal formula where one is published.

Each function yields measurements one by one, so that a record can be written as they come.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nmke.attribution.fused import log_totals, plain_log_totals, runs_fused
from nmke.attribution.log_prob import ProbabilityIncrease
from nmke.attribution.logits import raw_logits
from nmke.config import EditConfig
from nmke.editors.alphaedit import AlphaEdit
from nmke.editors.keys import KeyPass
from nmke.editors.memory import KeyMemory
from nmke.editors.method import Batch, methods
from nmke.editors.ordinary import ordinary_system
from nmke.editors.per_edit import per_edit_directions, write_directions
from nmke.editors.pipeline import compute_updates
from nmke.editors.scored_prompts import scored_prompts
from nmke.editors.targets import edit_rows, optimise_targets
from nmke.models.load import EditableModel
from nmke.models.norms import FrozenNorm
from nmke.models.replay import replay_is_exact
from nmke.models.weights import DownProjection, written_matrix
from nmke.stats.covariance import LARGEST_EXACT, KeyCovariance, LayerStats
from nmke.stats.store import BATCH_WINDOWS, WINDOW, add_windows
from nmke.types import EditRequest
from speed import literal
from speed.floors import Stage, stage
from speed.models import CONTEXTS, Shape, requests


@dataclass(frozen=True)
class Subject:
    """What is measured.

    Args:
        model: The model.
        shape: Its sizes.
        stats: Key statistics of the edited layers.
        repeats: Runs per measurement.
    """

    model: EditableModel
    shape: Shape
    stats: dict[int, LayerStats]
    repeats: int

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.device

    def config(self, **changes: Any) -> EditConfig:
        """NMKE with the number of steps fixed: nothing stops early on random weights."""
        base = {
            "method": "nmke-linear", "layers": self.shape.edited, "steps": self.steps, "stop_loss": 0.0,
            "covariance_rank": self.rank,
        }  # fmt: skip
        if self.device.type == "cuda":
            base["token_budget"] = 16_384
        config = EditConfig.create(**{**base, **changes})
        return methods.get(config.method).fill(config)

    @property
    def steps(self) -> int:
        """Of the target optimisation: as many as real edits take at most, fewer where a step takes a second."""
        return 25 if self.device.type == "cuda" else 4

    @property
    def rank(self) -> int | None:
        """Directions kept of a large layer's statistics, so that its state fits 1.5 GiB."""
        return 3500 if self.shape.d_mlp > LARGEST_EXACT else None

    def bytes_of(self, *tensors: Tensor) -> int:
        """Size of some tensors together."""
        return sum(t.numel() * t.element_size() for t in tensors)


def gather(model: EditableModel, shape: Shape, windows: int) -> dict[int, LayerStats]:
    """Key statistics over made-up windows, with a ridge where there are fewer tokens than neurons."""
    totals = {i: KeyCovariance.empty(shape.d_mlp, model.device) for i in shape.edited}
    for begin in range(0, windows, BATCH_WINDOWS):
        add_windows(model, totals, made_up(min(BATCH_WINDOWS, windows - begin), begin))
    found = {}
    for layer, total in totals.items():
        moment = total.moment
        del total.total  # one matrix at a time
        moment.diagonal().add_(1e-3 * float(moment.diagonal().mean()))
        found[layer] = LayerStats(moment, "share", 0.75)
    return found


def made_up(count: int, seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(5, 400, (count, WINDOW), generator=generator).tolist()


def statistics(subject: Subject) -> Iterator[Stage]:
    """One batch of windows of text: forward to the last edited layer and a product of keys per layer."""
    shape, windows = subject.shape, made_up(BATCH_WINDOWS, 0)
    totals = {i: KeyCovariance.empty(shape.d_mlp, subject.device) for i in shape.edited}
    tokens = BATCH_WINDOWS * WINDOW
    forward = 2 * tokens * shape.block_parameters * (shape.edited[-1] + 1)
    products = 2 * tokens * shape.d_mlp**2 * len(shape.edited)
    yield stage(
        "key statistics", lambda: add_windows(subject.model, totals, windows), subject.device,
        operations=forward + products, dtype=torch.float32, repeats=subject.repeats,
        bytes=3 * subject.bytes_of(*(t.total for t in totals.values())), setting={"tokens": tokens},
    )  # fmt: skip


def targets(subject: Subject, batches: Sequence[int]) -> Iterator[Stage]:
    """Target values: forward and backward of the tail through the blocks behind the first edit, step by step.

    Small batches once more with padded tails, the slow twin.
    """
    shape, model, config = subject.shape, subject.model, subject.config()
    for batch in batches:
        asked = requests(batch)
        rows = [edit_rows(model, request, CONTEXTS) for request in asked]
        tokens = sum(each.tokens for each in rows)
        reads = sum(len(r.reads) + 1 for r in rows)
        blocks = shape.layers - shape.edited[0]
        forward = 2 * (tokens * shape.block_parameters * blocks + reads * shape.d_model * shape.d_vocab)
        weights = shape.block_parameters * blocks + shape.d_model * shape.d_vocab
        size = torch.finfo(model.dtype).bits // 8
        small = batch < 32
        for name, packable in (("target values", True), ("target values, padded", False))[: 1 + small]:
            with _packing(model, packable):
                found = stage(
                    name,
                    lambda asked=asked: optimise_targets(
                        model, asked, CONTEXTS, shape.edited, "down_proj", config
                    ),
                    subject.device, operations=2 * subject.steps * forward,
                    bytes=2 * subject.steps * size * weights,
                    dtype=_product_type(model), repeats=subject.repeats if small else 1, warm=int(small),
                    setting={"batch": batch, "steps": subject.steps, "tail tokens": tokens},
                )  # fmt: skip
            found.detail["seconds_per_edit"] = found.seconds / batch
            yield found


@contextmanager
def _packing(model: EditableModel, wanted: bool) -> Iterator[None]:
    """Whether tails may run packed."""
    assert replay_is_exact(model) and model.packable
    model.packable = wanted
    try:
        yield
    finally:
        model.packable = True


def _product_type(model: EditableModel) -> torch.dtype:
    from nmke.models.half_products import pays_off

    return torch.bfloat16 if pays_off(model) else model.dtype


def keys(subject: Subject, batches: Sequence[int]) -> Iterator[Stage]:
    """Keys before and after the write: the layers up to the last edited one, and the edited ones once more."""
    shape, model = subject.shape, subject.model
    for batch in batches:
        asked = requests(batch)
        heads = sum(len(model.encoder.encode(c)) for c in CONTEXTS if c)
        tokens = heads + sum(_prompt_tokens(model, request) for request in asked)

        def run(asked: Any = asked) -> None:
            found = KeyPass(model, asked, CONTEXTS, shape.edited)
            found.collect()
            found.collect(changed=shape.edited[0])

        blocks = shape.edited[-1] + 1 + len(shape.edited)
        yield stage(
            "keys", run, subject.device, operations=2 * tokens * shape.block_parameters * blocks, dtype=model.dtype,
            bytes=shape.block_parameters * blocks * torch.finfo(model.dtype).bits // 8,
            repeats=subject.repeats, setting={"batch": batch, "tokens": tokens},
        )  # fmt: skip


def _prompt_tokens(model: EditableModel, request: EditRequest) -> int:
    """Up to the subject's end, in every context that is used."""
    used = len(edit_rows(model, request, CONTEXTS).ids) - 1  # the last row asks for the KL
    return used * len(model.encoder.encode(request.text[: request.subject_end]))


def attribution(subject: Subject, batches: Sequence[int], with_literal: bool = True) -> Iterator[Stage]:
    """Log-probability increase of every neuron of one layer, six prompts per edit, and the literal formula."""
    model, shape, score = subject.model, subject.shape, ProbabilityIncrease("log")
    layer = shape.edited[0]
    size = torch.finfo(model.dtype).bits // 8
    for batch in batches:
        prompts = scored_prompts(model, requests(batch), CONTEXTS, "last", "predicted")
        readout = prompts.read(model, [layer])
        found = stage(
            "attribution, one layer", lambda readout=readout: score(readout, layer, 30.0), subject.device,
            operations=2 * shape.d_mlp * shape.d_model * shape.d_vocab, dtype=model.dtype,
            bytes=size * shape.d_model * (shape.d_mlp + shape.d_vocab), repeats=subject.repeats,
            setting={"batch": batch, "prompts": len(prompts.rows), "kernel": runs_fused(model.model.lm_head.weight)},
        )  # fmt: skip
        found.detail["seconds_per_edit_five_layers"] = 5 * found.seconds / batch
        yield found
    if with_literal:
        yield from _literal_attribution(subject, layer)


def _literal_attribution(subject: Subject, layer: int) -> Iterator[Stage]:
    """One prompt as the released code does it, on a part of the neurons, and the error of ours on these."""
    model, shape = subject.model, subject.shape
    readout = scored_prompts(model, requests(1), CONTEXTS, "last", "predicted").read(model, [layer])
    layout = model.layout
    norm = FrozenNorm.probe(layout.final_norm, shape.d_model)
    statistic = norm.scale_at(readout.finals)
    base = raw_logits(layout, norm.apply(readout.middles[layer], statistic, None))[0]
    part = min(shape.d_mlp, 1024)
    values = DownProjection(layout.layers[layer].down_proj).read().T.float() * norm.weight.float()
    unembedding = written_matrix(layout.unembedding)
    steps = (30.0 * readout.coefficients[layer] * statistic)[0]
    given = (values[:part].to(unembedding.dtype), unembedding, base, readout.targets[0], steps[:part], 256)
    found = stage(
        "attribution, literal, one prompt and layer", lambda: literal.scores_of_one_prompt(*given), subject.device,
        operations=2 * part * shape.d_model * shape.d_vocab, dtype=model.dtype, repeats=subject.repeats,
        setting={"neurons": part},
    )  # fmt: skip
    found.detail["seconds_per_edit_five_layers"] = (
        found.seconds * shape.d_mlp / part * 5 * len(readout.targets)
    )
    few = slice(0, 64)
    log_p = torch.log_softmax(base.float(), 0)[None]
    rows, own = values[few].to(unembedding.dtype), steps[None, few].float()
    exact = _float64_totals(log_p, values[few], unembedding, own)
    found.detail["largest_error_nats"] = float(
        (log_totals(log_p, rows, unembedding, own) - exact).abs().max()
    )
    twin = plain_log_totals(log_p, rows, unembedding, own)
    found.detail["largest_difference_from_plain_nats"] = float(
        (log_totals(log_p, rows, unembedding, own) - twin).abs().max()
    )
    yield found


def _float64_totals(log_p: Tensor, values: Tensor, unembedding: Tensor, steps: Tensor) -> Tensor:
    slopes = torch.cat([values.double() @ part.double().T for part in unembedding.split(8192)], dim=1)
    return (log_p.double()[:, None] + steps.double()[..., None] * slopes).logsumexp(dim=2)


def solves(
    subject: Subject, remembered: Sequence[int], batch: int = 10, with_literal: bool = True
) -> Iterator[Stage]:
    """One layer's write directions behind a run of edits, and the published solves."""
    layer, m = subject.shape.edited[0], subject.shape.d_mlp
    stats, config = subject.stats[layer], subject.config()
    generator = torch.Generator().manual_seed(1)
    new = torch.randn(batch, m, generator=generator, dtype=torch.float64).to(subject.device)
    yield stage(
        "factor of one layer, once", lambda: ordinary_system(LayerStats(stats.held), config), subject.device,
        operations=m**3 / 3 if config.covariance_rank is None else 9 * m**3, repeats=1, warm=0,
        dtype=torch.float64 if m <= LARGEST_EXACT else torch.float32, setting={"rank": config.covariance_rank or m},
    )  # fmt: skip
    for count in remembered:
        past = torch.randn(count, m, generator=generator).to(subject.device)
        memory = KeyMemory.empty(m, subject.device).remember(past)
        rank = config.covariance_rank or m
        kept = len(stats.projector.basis.T)
        if memory.gram is None:
            operations = 4 * m * rank * batch + 2 * m * count**2 + count**3 / 3 + 4 * m * count * batch
            dual = 4 * m * (count + batch) * kept + 2 * m * count**2
        else:  # more keys than neurons: their second moment is solved with
            inside = m - kept if stats.projector.complement else kept
            operations = m**3 / 3 + 4 * m**2 * batch
            dual = 2 * m**2 * inside + 2 * m * inside**2 + inside**3 / 3
        settings = {"remembered": count, "batch": batch, "rank": rank}
        yield stage(
            "solve, one layer", lambda memory=memory: per_edit_directions(new, stats, memory, config), subject.device,
            operations=operations, dtype=torch.float64 if m <= LARGEST_EXACT else torch.float32, repeats=subject.repeats,
            bytes=4 * m * (rank + min(count, m)), setting=settings,
        )  # fmt: skip
        yield stage(
            "AlphaEdit's dual, one layer",
            lambda memory=memory: AlphaEdit().directions(new, stats, memory, None, subject.config(l2=10.0)),
            subject.device, operations=dual,
            dtype=torch.float64, repeats=subject.repeats, setting=settings,
        )  # fmt: skip
        if with_literal:
            yield from _literal_solves(subject, stats, new, past, settings)


def _literal_solves(
    subject: Subject, stats: LayerStats, new: Tensor, past: Tensor, setting: dict[str, Any]
) -> Iterator[Stage]:
    config, m = subject.config(), subject.shape.d_mlp
    exact = torch.float64 if m <= LARGEST_EXACT else torch.float32
    keys, earlier = new.T.to(exact), past.to(exact)
    gram = earlier.T @ earlier
    moment = stats.moment.to(exact)
    weight, l2 = config.covariance_weight or 1.0, config.l2 or 1.0
    found = stage(
        "MEMIT's solve, literal, one layer", lambda: literal.memit_directions(moment, keys, gram, weight, l2),
        subject.device, operations=2 * m**3 / 3, dtype=exact, repeats=1, setting=setting,
        bytes=3 * subject.bytes_of(moment),
    )  # fmt: skip
    if config.covariance_rank is None:
        ours = write_directions(new, stats, KeyMemory.empty(m, subject.device).remember(past), config)
        theirs = literal.memit_directions(moment, keys, gram, weight, l2).T
        found.detail["largest_relative_difference"] = float((ours - theirs).abs().max() / theirs.abs().max())
    yield found
    projector = stats.projector.dense().to(exact)
    residuals = torch.randn(subject.shape.d_model, len(new), device=subject.device, dtype=exact)
    yield stage(
        "AlphaEdit's solve, literal, one layer",
        lambda: literal.alphaedit_update(projector, keys, gram, residuals, 10.0), subject.device,
        operations=2 * m**3 + 2 * m**3 / 3, dtype=exact, repeats=1, setting=setting,
        bytes=4 * subject.bytes_of(projector),
    )  # fmt: skip


def whole(subject: Subject, batches: Sequence[int]) -> Iterator[Stage]:
    """A batch from requests to updates, by the default method and with attribution of a mask per batch.

    Every layer is given the first one's statistics, so that one factor serves all: its time is measured apart.
    """
    stats = dict.fromkeys(subject.shape.edited, subject.stats[subject.shape.edited[0]])
    for scope in ("edit", "batch"):
        more = {} if scope == "edit" else {"mask_scope": "batch", "attribution": "lps", "targets": "joint"}
        config = subject.config(**more)
        for batch in batches:
            asked, seconds = requests(batch), {}

            def run(
                asked: Any = asked, config: EditConfig = config, seconds: dict[str, float] = seconds
            ) -> None:
                given = Batch(subject.model, asked, CONTEXTS, config, stats=stats)
                seconds.update(compute_updates(methods.get("nmke-linear"), given).seconds)

            found = stage(
                f"whole batch, a mask per {scope}", run, subject.device, operations=0.0, dtype=subject.model.dtype,
                repeats=1, warm=int(batch == batches[0]), setting={"batch": batch, "steps": subject.steps},
            )  # fmt: skip
            found.detail |= {"seconds_per_edit": found.seconds / batch, "stages": dict(seconds)}
            yield found


def state_bytes(subject: Subject, remembered: int = 2000) -> dict[str, float]:
    """What five layers keep between batches, in GiB, ours and published (three matrices of d_mlp² per layer)."""
    m, layers = subject.shape.d_mlp, len(subject.shape.edited)
    exact = m <= LARGEST_EXACT
    rank, remembered = subject.rank or m, min(remembered, m)  # beyond m edits their second moment is kept
    ours = layers * m * (rank * (8 if exact else 4) + remembered * (12 if exact else 4))
    return {
        "ours_gib": ours / 2**30,
        "published_gib": layers * 3 * 4 * m**2 / 2**30,
        "remembered": remembered,
        "rank": rank,
        "largest_system_gib": 8 * math.prod((m, m)) / 2**30,
    }
