"""The three ways to score an edit; a number without its protocol's name is worthless.

- `teacher_forced` (EasyEdit, Yao et al. 2023, arXiv:2305.13172): prompt and target are fed together; share
  of target tokens that are the argmax. Locality: same argmax tokens as the unedited model on neighbours.
- `likelihood` (ROME, Meng et al. 2022, arXiv:2202.05262): is the new object likelier than the true one, by
  mean loss per token. Much looser.
- `generation` (WILD, Yang et al. 2025, arXiv:2502.11177): greedy answer of a fixed budget from the prompt
  alone, cut at the end of text, a newline or a full stop.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from nmke.errors import ConfigError, RequestError, unknown_name
from nmke.evaluation.base_outputs import BaseOutputs
from nmke.evaluation.metrics import (
    contains_answer,
    cut_answer,
    exact_match,
    harmonic_interval,
    token_accuracy,
)
from nmke.evaluation.score_table import ProtocolScores, RequestScores, ScoreTable, Values, summarise
from nmke.evaluation.target_scores import TOKEN_BUDGET, Pair, TargetScore, predictions
from nmke.models.load import EditableModel
from nmke.types import EditRequest

GENERATION_TOKENS = 16
QUESTIONS = "portability"  # what the names of metrics of questions begin with

# A request's values per metric, and its generated answer if there is one.
Outcome = tuple[Values, str | None]


@dataclass(frozen=True)
class Scorer:
    """A protocol: its version, the metrics that are averaged, and how one model is scored.

    Args:
        version: Goes into every output; rises when a number could change.
        metrics: Names of the metrics in the summary; further values stay in the rows.
        run: Values of every request, {} for one that cannot be scored; with each request's answer text.
    """

    version: str
    metrics: tuple[str, ...]
    run: Callable[[EditableModel, Sequence[EditRequest], "Inputs"], list[Outcome]]


@dataclass(frozen=True)
class Inputs:
    """What a protocol needs beside model and requests, and the pairs that an earlier one has scored."""

    base: BaseOutputs | None
    token_budget: int
    max_new_tokens: int
    known: dict[Pair, TargetScore] = field(default_factory=dict)


def score(
    model: EditableModel,
    requests: Sequence[EditRequest],
    base: BaseOutputs | None = None,
    protocols: Sequence[str] = ("teacher_forced",),
    *,
    token_budget: int = TOKEN_BUDGET,
    max_new_tokens: int = GENERATION_TOKENS,
    seed: int = 0,
) -> ScoreTable:
    """Scores of the model on the requests.

    Args:
        model: The model as it is now.
        requests: What was edited; at least one.
        base: Outputs of the unedited model, for locality; without them locality is None.
        protocols: Names out of `PROTOCOLS`.
        token_budget: Largest number of tokens in a batch.
        max_new_tokens: Budget of a generated answer.
        seed: Of the bootstrap intervals.

    Raises:
        ConfigError: If a protocol is unknown.
        RequestError: If there is no request, or one does not fit the model.
    """
    if not requests:
        raise RequestError("no request to score; give a facts file with at least one fact")
    for name in protocols:
        if name not in PROTOCOLS:
            raise ConfigError(unknown_name("protocol", name, PROTOCOLS))
    inputs = Inputs(base, token_budget, max_new_tokens)
    ordered = [name for name in PROTOCOLS if name in protocols]
    results = {name: PROTOCOLS[name].run(model, requests, inputs) for name in ordered}
    answers = [text for _, text in results.get("generation", [({}, None)] * len(requests))]
    rows = [
        RequestScores(
            request.id, {name: result[index][0] for name, result in results.items()}, answers[index]
        )
        for index, request in enumerate(requests)
    ]
    return table_of(rows, ordered, max_new_tokens=max_new_tokens, seed=seed)


def table_of(
    rows: Sequence[RequestScores],
    protocols: Sequence[str],
    *,
    max_new_tokens: int = GENERATION_TOKENS,
    seed: int = 0,
) -> ScoreTable:
    """The table over rows that were scored together or one batch after another.

    Args:
        rows: One per request.
        protocols: Those that the rows were scored under.
        max_new_tokens: Budget that generated answers had.
        seed: Of the bootstrap intervals.
    """
    made = {
        name: summary(name, [row.values[name] for row in rows], max_new_tokens, seed) for name in protocols
    }
    return ScoreTable(made, tuple(rows))


def summary(
    name: str, values: Sequence[Values], max_new_tokens: int = GENERATION_TOKENS, seed: int = 0
) -> ProtocolScores:
    """Estimates and counts of one protocol, from each request's values as `ScoreTable.rows` hold them.

    Metrics of questions that follow from edits join those of the protocol.
    """
    scorer = PROTOCOLS[name]
    scored = [row for row in values if row.keys() & set(scorer.metrics)]
    estimates, counts = summarise(scored, scorer.metrics, seed)
    counts["requests_left_out"] = len(values) - len(scored)
    if name == "likelihood":
        complete = all(estimates[metric] is not None for metric in scorer.metrics)
        table = [[_mean_or_none(row.get(metric)) for metric in scorer.metrics] for row in scored]
        estimates["score"] = harmonic_interval(table, seed) if complete else None
    asked = sorted({metric for row in values for metric in row if metric.startswith(QUESTIONS)})
    more, more_counts = summarise(values, asked, seed)
    settings = {"max_new_tokens": max_new_tokens} if name == "generation" else {}
    return ProtocolScores(scorer.version, estimates | more, len(scored), counts | more_counts, settings)


def _teacher_forced(model: EditableModel, requests: Sequence[EditRequest], inputs: Inputs) -> list[Outcome]:
    kept = _locality(model, requests, inputs.base, inputs) if inputs.base else [[] for _ in requests]
    asked = [_asked(request, request.target_new) for request in requests]
    scores = _scored(model, asked, inputs)
    outcomes: list[Outcome] = []
    for pairs, locality in zip(asked, kept, strict=True):
        prompt, *paraphrases = (scores[pair] for pair in pairs)
        values = _present(
            reliability=[prompt.accuracy],
            generalization=[hit.accuracy for hit in paraphrases],
            locality=locality,
            p_new=[math.exp(prompt.log_prob)],
        )
        outcomes.append((values, None))
    return outcomes


def _locality(
    model: EditableModel, requests: Sequence[EditRequest], base: BaseOutputs, inputs: Inputs
) -> list[list[float]]:
    """Per request and neighbour, the share of argmax tokens that are the unedited model's.

    The neighbours run apart from all else, in the batches of `collect_base`, so that unchanged weights
    score exactly 1 in bfloat16 too; hence they come before the prompts and before the other protocols.
    """
    pairs = [[base.pair(request, neighbor) for neighbor in request.neighborhood] for request in requests]
    scores = _scored(model, pairs, inputs)
    return [
        [token_accuracy(scores[pair].predicted, base.predicted[pair]) for pair in group] for group in pairs
    ]


def _likelihood(model: EditableModel, requests: Sequence[EditRequest], inputs: Inputs) -> list[Outcome]:
    usable = [request for request in requests if _true_answer(request)]
    pairs = [
        [*_asked(request, request.target_new), *_asked(request, _true_answer(request))] for request in usable
    ]
    for request, group in zip(usable, pairs, strict=True):
        for prompt, answer in _contrasts(request):
            group += [(prompt, request.target_new), (prompt, answer)]
    scores = _scored(model, pairs, inputs)
    return [(_likelihood_row(request, scores) if _true_answer(request) else {}, None) for request in requests]


def _likelihood_row(request: EditRequest, scores: Mapping[Pair, TargetScore]) -> Values:
    """Efficacy, paraphrase and specificity of one request: 1.0 where the right answer is the likelier."""
    new, true = request.target_new, _true_answer(request)
    wins = [
        float(scores[prompt, new].mean_nll < scores[prompt, true].mean_nll)
        for prompt in (request.text, *request.paraphrases)
    ]
    kept = [
        float(scores[prompt, answer].mean_nll < scores[prompt, new].mean_nll)
        for prompt, answer in _contrasts(request)
    ]
    return _present(efficacy=wins[:1], paraphrase=wins[1:], specificity=kept)


def _generation(model: EditableModel, requests: Sequence[EditRequest], inputs: Inputs) -> list[Outcome]:
    prompts = list(dict.fromkeys(p for request in requests for p in (request.text, *request.paraphrases)))
    texts = model.generate(prompts, inputs.max_new_tokens, stop_at_newline=True)
    said = dict(zip(prompts, texts, strict=True))
    results: list[Outcome] = []
    for request in requests:
        target = request.target_new
        answers = [cut_answer(said[prompt], target) for prompt in (request.text, *request.paraphrases)]
        exact = [float(exact_match(answer, target)) for answer in answers]
        inside = [float(contains_answer(answer, target)) for answer in answers]
        values = _present(
            exact_match=exact[:1],
            contains=inside[:1],
            paraphrase_exact_match=exact[1:],
            paraphrase_contains=inside[1:],
        )
        results.append((values, answers[0]))
    return results


def _asked(request: EditRequest, target: str) -> list[Pair]:
    """The request's prompt, then its paraphrases, each with the target."""
    return [(prompt, target) for prompt in (request.text, *request.paraphrases)]


def _true_answer(request: EditRequest) -> str:
    """The true answer, "" where it is unknown or the same as the new one (nothing to compare)."""
    true = request.target_true or ""
    return "" if true.strip() == request.target_new.strip() else true


def _contrasts(request: EditRequest) -> list[Pair]:
    """Neighbour prompts with the answer that must stay likelier than the new object."""
    pairs = [
        (neighbor.prompt, neighbor.answer or request.target_true or "") for neighbor in request.neighborhood
    ]
    return [pair for pair in pairs if pair[1].strip() not in ("", request.target_new.strip())]


def _scored(
    model: EditableModel, groups: Sequence[Sequence[Pair]], inputs: Inputs
) -> dict[Pair, TargetScore]:
    """Every distinct pair of the groups with its score; pairs are run once, whatever asks for them."""
    pairs = {pair for group in groups for pair in group}
    missing = sorted(pairs - inputs.known.keys())
    inputs.known.update(zip(missing, predictions(model, missing, inputs.token_budget), strict=True))
    return {pair: inputs.known[pair] for pair in pairs}


def _present(**values: Sequence[float]) -> Values:
    """The metrics that have a value."""
    return {name: tuple(found) for name, found in values.items() if found}


def _mean_or_none(values: Sequence[float] | None) -> float | None:
    return sum(values) / len(values) if values else None


PROTOCOLS: Mapping[str, Scorer] = {
    "teacher_forced": Scorer(
        "teacher_forced/1", ("reliability", "generalization", "locality"), _teacher_forced
    ),
    "likelihood": Scorer("likelihood/1", ("efficacy", "paraphrase", "specificity"), _likelihood),
    "generation": Scorer(
        "generation/1",
        ("exact_match", "contains", "paraphrase_exact_match", "paraphrase_contains"),
        _generation,
    ),
}
