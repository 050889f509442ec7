"""What is computed from token ids, losses and texts: no model, no tokenizer, no file."""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from nmke.errors import NumericsError

RESAMPLES = 2000
_BLOCK = 2**20
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans({sign: " " for sign in string.punctuation + "“”‘’«»„–—…"})
_STOP = re.compile(r"。|\.(?=[\s\"'”’)]|$)")
_FIRST_UNSPACED = 0x0E00


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % bootstrap interval.

    Args:
        mean: The mean.
        low, high: 2.5th and 97.5th percentile of the resampled means; equal to the mean when n is 1.
        n: How many values were averaged and resampled.
    """

    mean: float
    low: float
    high: float
    n: int


def token_accuracy(predicted: Sequence[int], target: Sequence[int]) -> float:
    """Share of target tokens that are the argmax, in [0, 1].

    Args:
        predicted: Argmax token ids at the target's positions, teacher-forced.
        target: Token ids to be hit, as many; the unedited model's argmax ids make this locality.

    Raises:
        ValueError: If the lengths differ or are 0.
    """
    if len(predicted) != len(target) or not target:
        raise ValueError(
            f"{len(predicted)} predicted and {len(target)} target tokens: lengths must agree, not 0"
        )
    return sum(a == b for a, b in zip(predicted, target, strict=True)) / len(target)


def mean_interval(values: Sequence[float], seed: int = 0, resamples: int = RESAMPLES) -> Estimate:
    """Mean and 95 % percentile-bootstrap interval; the same seed gives the same numbers.

    Args:
        values: Independent scores, one per request, at least one.
        seed: Of the resampling.
        resamples: How many bootstrap samples are drawn.

    Raises:
        ValueError: If there is no value.
        NumericsError: If a value is NaN or infinite.
    """
    numbers = np.asarray(values, dtype=np.float64)
    if numbers.size == 0:
        raise ValueError("the mean of no value is not defined; leave the metric out instead")
    if not np.isfinite(numbers).all():
        raise NumericsError(f"{int((~np.isfinite(numbers)).sum())} of {numbers.size} scores are not finite")
    means = np.concatenate(
        [numbers[chosen].mean(axis=1) for chosen in _resampled(numbers.size, seed, resamples)]
    )
    low, high = np.percentile(means, [2.5, 97.5])
    return Estimate(float(numbers.mean()), float(low), float(high), int(numbers.size))


def paired_difference(after: Sequence[float], before: Sequence[float], seed: int = 0) -> Estimate:
    """Mean of `after - before` over the same requests, with its interval."""
    if len(after) != len(before):
        raise ValueError(f"{len(after)} and {len(before)} values: pairs need the same requests in both")
    return mean_interval([a - b for a, b in zip(after, before, strict=True)], seed)


def exp_mean_interval(sums: Sequence[float], counts: Sequence[float], seed: int = 0) -> Estimate:
    """Exp of the count-weighted mean, with its interval from resampling the parts: a perplexity.

    Args:
        sums: Negative log-probability of each part (a window, a word), nats.
        counts: Tokens of each part.
        seed: Of the resampling.

    Raises:
        ValueError: If there is no part, or the lists differ in length.
        NumericsError: If a sum is not finite.
    """
    total, weight = np.asarray(sums, dtype=np.float64), np.asarray(counts, dtype=np.float64)
    if total.size == 0 or total.shape != weight.shape:
        raise ValueError(
            f"{total.size} sums and {weight.size} counts: both need one number a part, at least one"
        )
    if not np.isfinite(total).all():
        raise NumericsError(f"{int((~np.isfinite(total)).sum())} of {total.size} losses are not finite")
    drawn = [
        total[chosen].sum(axis=1) / weight[chosen].sum(axis=1)
        for chosen in _resampled(total.size, seed, RESAMPLES)
    ]
    low, high = np.exp(np.percentile(np.concatenate(drawn), [2.5, 97.5]))
    return Estimate(float(np.exp(total.sum() / weight.sum())), float(low), float(high), int(total.size))


def _resampled(size: int, seed: int, resamples: int, columns: int = 1) -> Iterator[np.ndarray]:
    """Places of bootstrap samples, [samples, size], in blocks of bounded memory; the draws do not depend on these."""
    generator = np.random.default_rng(seed)
    rows = max(1, _BLOCK // (size * columns))
    for start in range(0, resamples, rows):
        yield generator.integers(0, size, size=(min(rows, resamples - start), size))


def harmonic_mean(values: Sequence[float]) -> float:
    """Harmonic mean of scores in [0, 1]; 0 as soon as one is 0. Source: ROME's score S, arXiv:2202.05262."""
    if not values or min(values) <= 0.0:
        return 0.0
    return len(values) / sum(1.0 / value for value in values)


def _harmonic_means(rows: np.ndarray) -> np.ndarray:
    """`harmonic_mean` of every row."""
    positive = (rows > 0).all(axis=1)
    return np.where(positive, rows.shape[1] / (1 / np.where(rows > 0, rows, 1.0)).sum(axis=1), 0.0)


def harmonic_interval(rows: Sequence[Sequence[float | None]], seed: int = 0) -> Estimate:
    """Harmonic mean of the columns' means, with an interval from resampling the rows.

    Args:
        rows: One row per request, one column per score; None where a request has no such prompt.
        seed: Of the resampling.

    Raises:
        ValueError: If a column has no value at all.
    """
    table = np.array(
        [[np.nan if value is None else value for value in row] for row in rows], dtype=np.float64
    )
    if table.size == 0 or np.isnan(table).all(axis=0).any():
        raise ValueError("a score has no value in any row; leave the harmonic mean out instead")
    point = harmonic_mean(np.nanmean(table, axis=0).tolist())
    present, values = ~np.isnan(table), np.nan_to_num(table)
    drawn = []
    for chosen in _resampled(len(table), seed, RESAMPLES, table.shape[1]):
        counts = present[chosen].sum(axis=1)  # [samples, size, scores] -> [samples, scores]
        whole = (counts > 0).all(axis=1)
        drawn.append(_harmonic_means(values[chosen].sum(axis=1)[whole] / counts[whole]))
    everything = np.concatenate(drawn)
    low, high = np.percentile(everything if everything.size else [point], [2.5, 97.5])
    return Estimate(point, float(low), float(high), len(table))


def normalise_answer(text: str) -> str:
    """The text in lower case without punctuation, English articles and repeated spaces (as SQuAD does)."""
    plain = unicodedata.normalize("NFKC", text).lower().translate(_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", plain).split())


def cut_answer(text: str, target: str = "") -> str:
    """The generated text up to the first newline or full stop.

    A full stop counts at the end of a word only ("3.5" is whole), and as many as the target itself holds
    are passed over, so that "St. Louis" can be hit.
    """
    line = next((part for part in text.splitlines() if part.strip()), "") if text.strip() else ""
    allowed = len(_STOP.findall(target))
    stops = [match.start() for match in _STOP.finditer(line)]
    return line[: stops[allowed]].strip() if len(stops) > allowed else line.strip()


def exact_match(text: str, target: str) -> bool:
    """Whether text and target are equal once normalised."""
    return normalise_answer(text) == normalise_answer(target)


def contains_answer(text: str, target: str) -> bool:
    """Whether the normalised target stands in the normalised text, as whole words where words have spaces."""
    inside, whole = normalise_answer(target), normalise_answer(text)
    if not inside:
        return False
    if any(ord(letter) >= _FIRST_UNSPACED for letter in inside):
        return inside in whole
    return f" {inside} " in f" {whole} "
