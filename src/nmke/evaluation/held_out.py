"""Perplexity on WikiText-2 test, and how far the edited model's predictions are from the unedited model's.

Source: Merity et al. 2016, arXiv:1609.07843, in the tokenised form with <unk>; the text is never used for key
statistics. Windows of 512 tokens do not overlap; KL is read on the first 256 tokens of each.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from nmke.errors import NumericsError
from nmke.evaluation.ability.measure import AbilityScores, select
from nmke.evaluation.data_sets import missing
from nmke.evaluation.metrics import exp_mean_interval, mean_interval
from nmke.evaluation.perplexity import text_windows
from nmke.evaluation.target_scores import TargetRow, score_rows
from nmke.facts import data_path
from nmke.facts.reader import file_sha256
from nmke.facts.rows import open_rows
from nmke.models.load import EditableModel
from nmke.models.tokens import pad_batch

FILES = ("text_wikitext2_test.jsonl", "wikitext2_test.txt")
TITLE = "WikiText-2 test, windows of 512 tokens"
VERSION = "nmke_wikitext2/1"
KL_TOKENS = 256
KL_LOGITS = 2**26
_HEADING = re.compile(r"^ = [^=].*[^=] = $", re.MULTILINE)


def wikitext(
    model: EditableModel,
    *,
    limit: int | None = None,
    seed: int = 0,
    base: Callable[[], AbstractContextManager[None]] | None = None,
) -> AbilityScores:
    """Perplexity with its interval, and KL(unedited ‖ edited) in nats per token when `base` is given.

    Args:
        model: The model as it is now.
        limit: Read so many windows, drawn by the seed; None reads all.
        seed: Of the draw and of the bootstrap intervals, which resample windows.
        base: Context in which the model is unedited.

    Raises:
        RequestError: If the text is not on this machine.
        NumericsError: If the model gives losses that are not finite.
    """
    path = wikitext_path()
    if path is None:
        raise missing("task", "wikitext", FILES)
    begun = time.perf_counter()
    windows = text_windows(model, read_articles(path))
    chosen = [windows[row["at"]] for row in select([{"at": i} for i in range(len(windows))], limit, seed)]
    losses = [-sum(hit.log_probs) for hit in score_rows(model, chosen)]
    counts = [float(row.n_target) for row in chosen]
    metrics = {"perplexity": exp_mean_interval(losses, counts, seed)}
    values = {"perplexity": tuple(loss / count for loss, count in zip(losses, counts, strict=True))}
    if base is not None:
        values["kl"] = tuple(divergences(model, base, [_shortened(row) for row in chosen]))
        metrics["kl"] = mean_interval(values["kl"], seed)
    seconds = time.perf_counter() - begun
    return AbilityScores(
        "wikitext", TITLE, VERSION, metrics, values, len(chosen), file_sha256(path), None, seconds
    )


def wikitext_path() -> Path | None:
    """Where the text is, None if it is not on this machine."""
    return next((found for name in FILES if (found := data_path(name)) is not None), None)


def read_articles(path: Path) -> list[str]:
    """The articles: JSON lines with `text`, or the published text, parted at its headings."""
    with path.open("rb") as file:
        if file.read(1) != b"{":
            text = path.read_text(encoding="utf-8")
            return [part.strip() for part in _HEADING.split(text) if part.strip()]
    with open_rows(path) as (_, records):
        return [record.data["text"] for record in records]


def divergences(
    model: EditableModel, base: Callable[[], AbstractContextManager[None]], rows: Sequence[TargetRow]
) -> Iterator[float]:
    """KL(unedited ‖ edited) of the next token, nats, mean over each row's scored tokens.

    Raises:
        NumericsError: If a probability is not finite.
    """
    d_vocab = model.model.get_output_embeddings().weight.shape[0]
    start = 0
    while start < len(rows):
        width = len(rows[start].ids)
        some = rows[start : start + max(1, KL_LOGITS // (d_vocab * width))]
        start += len(some)
        now = _log_probs(model, some)
        with base():
            before = _log_probs(model, some)
        for old, new in zip(before, now, strict=True):
            kl = float((old.exp() * (old - new)).sum(dim=-1).double().mean())
            if not torch.isfinite(torch.tensor(kl)):
                raise NumericsError(f"KL to the unedited model is {kl}; the weights are damaged")
            yield max(0.0, kl)


@torch.inference_mode()
def _log_probs(model: EditableModel, rows: Sequence[TargetRow]) -> list[Float[Tensor, "seq d_vocab"]]:
    """Log-probabilities of the whole vocabulary at each row's scored tokens."""
    batch = pad_batch([list(row.ids) for row in rows], model.encoder.pad_id, device=model.device)
    logits = model.model(**model.inputs(batch)).logits  # [batch seq d_vocab]
    return [
        logits[place, row.start : row.start + row.n_target].float().log_softmax(dim=-1)
        for place, row in enumerate(rows)
    ]


def _shortened(row: TargetRow) -> TargetRow:
    """The row's first tokens; those behind are not scored."""
    ids = row.ids[:KL_TOKENS]
    return TargetRow(ids, row.n_target - (len(row.ids) - len(ids)))
