"""How the edited model is after a batch: distance to the unedited one, held-out text, earlier edits.

Cheap on purpose, so that it can run after every batch: some two hundred tokens of held-out text and the prompts
of at most twenty earlier edits. It tells a collapse from an ordinary run; it is no evaluation.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from importlib import resources
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from nmke.config import EditConfig
from nmke.evaluation.perplexity import text_windows
from nmke.evaluation.target_scores import MAX_LOGITS, TargetRow, predictions
from nmke.models.load import EditableModel
from nmke.models.tokens import length_buckets, pad_batch
from nmke.types import EditRequest

WINDOW = 10  # tokens of each held-out text
KL_POSITIONS = 50
MOST_ASKED = 20  # earlier edits
FEWEST_JUDGED = 10  # below this many, retention raises no alarm
HealthStatus = Literal["ok", "warn", "stop"]


@dataclass(frozen=True)
class HealthReport:
    """The model after a batch.

    Args:
        status: The worst that any number says.
        kl: Mean KL(unedited ‖ edited) of the next token on held-out text, nats.
        perplexity, perplexity_base: On held-out text, edited and unedited.
        retention: Mean share of target tokens that earlier edits still get right, teacher forced; None without any.
        asked: How many earlier edits were asked.
        reached: Share of this batch's facts that the model now says.
        drift: ‖W - W_base‖ / ‖W_base‖ per layer.
        reasons: Which limit was crossed, one sentence each.
        seconds: What it took.
    """

    status: HealthStatus
    kl: float
    perplexity: float
    perplexity_base: float
    retention: float | None
    asked: int
    reached: float
    drift: dict[int, float]
    reasons: tuple[str, ...] = ()
    seconds: float = 0.0

    def as_json(self) -> dict[str, Any]:
        """Its fields for the ledger; numbers that are not finite become null."""
        content = asdict(self) | {"drift": {str(layer): value for layer, value in self.drift.items()}}
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in content.items()}


@dataclass(frozen=True)
class Reading:
    """What a model says on the held-out text.

    Args:
        loss: Mean negative log-probability per token, nats.
        log_probs: Of the whole vocabulary at some positions, float32.
    """

    loss: float
    log_probs: Float[Tensor, "positions d_vocab"]


class HealthCheck:
    """Held-out text, and what the unedited model says on it, read when first needed.

    Args:
        model: The session's model.
        base: Context in which it is unedited.
    """

    def __init__(self, model: EditableModel, base: Callable[[], AbstractContextManager[None]]) -> None:
        self._model, self._base = model, base
        self._rows: list[TargetRow] = []
        self._unedited: Reading | None = None

    def measure(
        self, config: EditConfig, old: Sequence[EditRequest], reached: float, drift: Mapping[int, float]
    ) -> HealthReport:
        """The model as it is now.

        Args:
            config: Holds the limits.
            old: Earlier edits to ask again.
            reached: Share of the batch's facts that the model now says.
            drift: Of each layer.
        """
        start = time.perf_counter()
        if self._unedited is None:
            self._rows = [
                row for text in heldout_texts() for row in text_windows(self._model, [text], WINDOW)[:1]
            ]
            with self._base():
                self._unedited = read(self._model, self._rows)
        now = read(self._model, self._rows)
        kl = divergence(self._unedited.log_probs, now.log_probs)
        retention = _retention(self._model, old)
        perplexities = (perplexity_of(now.loss), perplexity_of(self._unedited.loss))
        status, reasons = judge(config, kl, perplexities, retention, len(old))
        seconds = time.perf_counter() - start
        return HealthReport(
            status, kl, *perplexities, retention, len(old), reached, dict(drift), reasons, seconds
        )


def judge(
    config: EditConfig, kl: float, perplexities: tuple[float, float], retention: float | None, asked: int
) -> tuple[HealthStatus, tuple[str, ...]]:
    """Numbers against their limits: the status, and why.

    Args:
        config: Holds the limits.
        kl: See `HealthReport`; as are the rest.
        perplexities: Edited and unedited.
        retention: Judged only when at least ten edits were asked.
        asked: How many were.
    """
    ratio = perplexities[0] / perplexities[1]
    found = [
        _above("KL to the unedited model", kl, config.kl_warn, config.kl_stop),
        _above("perplexity over the unedited model's", ratio, config.perplexity_warn, config.perplexity_stop),
    ]
    if retention is not None and asked >= FEWEST_JUDGED:
        lost = _above("", -retention, -config.retention_warn, -config.retention_stop)
        if lost is not None:
            limit = config.retention_stop if lost[0] == "stop" else config.retention_warn
            found.append((lost[0], f"retention of {asked} earlier edits is {retention:.2f}, limit {limit:g}"))
    crossed = [item for item in found if item is not None]
    status: HealthStatus = "stop" if any(level == "stop" for level, _ in crossed) else "ok"
    status = "warn" if crossed and status == "ok" else status
    return status, tuple(reason for _, reason in crossed)


def heldout_texts() -> list[str]:
    """Plain sentences of ours, of varied kind; none states a fact that one would edit."""
    text = resources.files("nmke.data").joinpath("heldout.txt").read_text(encoding="utf-8")
    return text.splitlines()


@torch.inference_mode()
def read(model: EditableModel, rows: Sequence[TargetRow], positions: int = KL_POSITIONS) -> Reading:
    """What the model says on the rows: the loss of every token, all log-probabilities at about `positions`."""
    d_vocab = model.model.get_output_embeddings().weight.shape[0]
    stride = max(1, sum(row.n_target for row in rows) // positions)
    losses, kept, offset = [], [], 0
    for bucket in length_buckets([len(row.ids) for row in rows], max(1, MAX_LOGITS // d_vocab)):
        batch = pad_batch([list(rows[i].ids) for i in bucket], model.encoder.pad_id, device=model.device)
        logits = model.model(**model.inputs(batch)).logits  # [batch seq d_vocab]
        for place, row in enumerate(rows[i] for i in bucket):
            scored = logits[place, row.start : row.start + row.n_target].float().log_softmax(dim=-1)
            ids = torch.tensor(row.ids[-row.n_target :], device=scored.device)
            losses.append(-scored.gather(1, ids[:, None])[:, 0])
            kept.append(scored[(-offset) % stride :: stride].clone())  # [some d_vocab]
            offset += row.n_target
    return Reading(float(torch.cat(losses).double().mean()), torch.cat(kept))


def divergence(base: Float[Tensor, "positions d_vocab"], now: Float[Tensor, "positions d_vocab"]) -> float:
    """Mean KL(base ‖ now) over positions, nats; at least 0 but for rounding."""
    return (
        max(0.0, float((base.exp() * (base - now)).sum(dim=-1).double().mean())) if _finite(now) else math.inf
    )


def _finite(values: Tensor) -> bool:
    return bool(torch.isfinite(values).all())


def _retention(model: EditableModel, old: Sequence[EditRequest]) -> float | None:
    if not old:
        return None
    scores = predictions(model, [(request.text, request.target_new) for request in old])
    return sum(score.accuracy for score in scores) / len(scores)


def perplexity_of(loss: float) -> float:
    """Exponential of a mean loss in nats; infinite where that is not finite."""
    return math.exp(min(loss, 700.0)) if math.isfinite(loss) else math.inf


def in_six_places(value: float | None, missing: str = "not finite") -> str:
    """A number that may be any size, as text: what is far from ordinary needs no decimals."""
    if value is None or not math.isfinite(value):
        return missing
    return f"{value:.2f}" if value < 1000 else f"{value:.0f}" if value < 1e6 else f"{value:.0e}"


def _above(what: str, value: float, warn: float, stop: float) -> tuple[HealthStatus, str] | None:
    if value > stop or math.isnan(value):
        return "stop", f"{what} is {in_six_places(value)}, limit {stop:g}"
    if value > warn:
        return "warn", f"{what} is {in_six_places(value)}, limit {warn:g}"
    return None
