"""Questions that follow from edits, scored under the three protocols: portability.

- `teacher_forced`: share of the first right answer's tokens that are the argmax.
- `likelihood`: is the first right answer likelier than its rival, by mean loss per token; only questions whose
  source names a rival (the old answer, or the one that another edit implies).
- `generation`: does the greedy answer equal, or contain, any of the right answers.

Each kind of question has a metric of its own beside the mean over all. What is averaged and resampled is the case:
its questions are not independent.
Differs: MQuAKE counts a case as solved when one of its three wordings is; here every wording counts for itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from nmke.evaluation.base_outputs import BaseOutputs
from nmke.evaluation.metrics import contains_answer, cut_answer, exact_match
from nmke.evaluation.protocols import GENERATION_TOKENS, QUESTIONS, score, table_of
from nmke.evaluation.score_table import RequestScores, ScoreTable, Values
from nmke.evaluation.target_scores import TOKEN_BUDGET, predictions
from nmke.models.load import EditableModel
from nmke.types import EditCase, Question

Judge = Callable[[EditableModel, Sequence[Question], int, int], list[dict[str, float]]]


def score_cases(
    model: EditableModel,
    cases: Sequence[EditCase],
    base: BaseOutputs | None = None,
    protocols: Sequence[str] = ("teacher_forced",),
    *,
    token_budget: int = TOKEN_BUDGET,
    max_new_tokens: int = GENERATION_TOKENS,
    seed: int = 0,
) -> ScoreTable:
    """Scores of the cases' facts, as `protocols.score` gives them, and of their questions.

    Args:
        model: The model as it is now.
        cases: What was edited; of several edits of one fact in a case the last is scored.
        base: Outputs of the unedited model, for locality.
        protocols: Names out of `PROTOCOLS`.
        token_budget: Largest number of tokens in a batch.
        max_new_tokens: Budget of a generated answer.
        seed: Of the bootstrap intervals.

    Returns:
        One row per fact; the values of a case's questions stand in the row of its last fact.

    Raises:
        ConfigError: If a protocol is unknown.
        RequestError: If there is no case, or one does not fit the model.
    """
    requests = [request for case in cases for request in case.final_requests]
    table = score(
        model,
        requests,
        base,
        protocols,
        token_budget=token_budget,
        max_new_tokens=max_new_tokens,
        seed=seed,
    )
    if not any(case.questions for case in cases):
        return table
    questions = [question for case in cases for question in case.questions]
    rows = list(table.rows)
    for name in table.protocols:
        found = iter(JUDGES[name](model, questions, token_budget, max_new_tokens))
        extra = {case.final_requests[-1].id: _values(case.questions, found) for case in cases}
        rows = [_with_values(row, name, extra.get(row.id, {})) for row in rows]
    return table_of(rows, list(table.protocols), max_new_tokens=max_new_tokens, seed=seed)


def _values(questions: Sequence[Question], found: Iterable[dict[str, float]]) -> Values:
    """One case's values by metric: over all kinds of question, and by kind."""
    values: dict[str, tuple[float, ...]] = {}
    for question, marks in zip(questions, found, strict=False):
        for suffix, mark in marks.items():
            for name in (QUESTIONS, f"{QUESTIONS}_{question.kind}"):
                values[name + suffix] = (*values.get(name + suffix, ()), mark)
    return values


def _with_values(row: RequestScores, name: str, extra: Values) -> RequestScores:
    return replace(row, values={**row.values, name: {**row.values.get(name, {}), **extra}})


def _teacher_forced(
    model: EditableModel, questions: Sequence[Question], budget: int, _tokens: int
) -> list[dict[str, float]]:
    pairs = [(question.prompt, question.answers[0]) for question in questions]
    return [{"": hit.accuracy} for hit in predictions(model, pairs, budget)]


def _likelihood(
    model: EditableModel, questions: Sequence[Question], budget: int, _tokens: int
) -> list[dict[str, float]]:
    pairs = [(q.prompt, answer) for q in questions if q.rival for answer in (q.answers[0], q.rival)]
    found = dict(zip(pairs, predictions(model, pairs, budget), strict=True))
    return [
        {"": float(found[q.prompt, q.answers[0]].mean_nll < found[q.prompt, q.rival].mean_nll)}
        if q.rival
        else {}
        for q in questions
    ]


def _generation(
    model: EditableModel, questions: Sequence[Question], _budget: int, tokens: int
) -> list[dict[str, float]]:
    prompts = list(dict.fromkeys(question.prompt for question in questions))
    said = dict(zip(prompts, model.generate(prompts, tokens, stop_at_newline=True), strict=True))
    return [_marks(said[question.prompt], question.answers) for question in questions]


def _marks(text: str, answers: Sequence[str]) -> dict[str, float]:
    """Whether the generated text is, or contains, any of the answers."""
    cut = [(cut_answer(text, answer), answer) for answer in answers]
    return {
        "_exact_match": float(any(exact_match(said, answer) for said, answer in cut)),
        "_contains": float(any(contains_answer(said, answer) for said, answer in cut)),
    }


JUDGES: dict[str, Judge] = {
    "teacher_forced": _teacher_forced,
    "likelihood": _likelihood,
    "generation": _generation,
}
