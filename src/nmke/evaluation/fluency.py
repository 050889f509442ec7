"""Fluency and consistency of what the model writes about edited subjects.

Source: Meng et al. 2022, arXiv:2202.05262, appendix on evaluation (GE and RS); formulas in `text_metrics`.
Differs: texts are drawn among the 64 likeliest tokens (there: 5). Consistency is read against what the *unedited*
model writes about other things of which the new answer is true (CounterFact's attribute prompts), where the paper
takes Wikipedia texts about them; numbers compare within this package only.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from nmke.errors import RequestError
from nmke.evaluation.ability.measure import AbilityScores
from nmke.evaluation.base_outputs import facts_hash
from nmke.evaluation.metrics import mean_interval
from nmke.evaluation.text_metrics import consistency, fluency
from nmke.models.load import EditableModel
from nmke.types import EditCase

TITLE = "100-token texts about edited subjects"
VERSION = "nmke_fluency/1"
TOKENS = 100
PROMPTS = 2  # of each case
REFERENCES = 5  # of each case


def references(model: EditableModel, cases: Sequence[EditCase], seed: int = 0) -> list[list[str]]:
    """For each case, texts of the unedited model about other things of which the new answer is true."""
    prompts = [list(case.attribute_prompts[:REFERENCES]) for case in cases]
    written = _written(model, prompts, seed)
    return [[written[prompt] for prompt in some] for some in prompts]


def write_and_judge(
    model: EditableModel,
    cases: Sequence[EditCase],
    told: Sequence[Sequence[str]] | None = None,
    *,
    seed: int = 0,
) -> AbilityScores:
    """Fluency, and consistency where there are references, averaged and resampled over cases.

    Args:
        model: The model as it is now.
        cases: Their own generation prompts are used, else the prompts that were edited.
        told: What `references` gave for the same cases; None leaves consistency out.
        seed: Of the drawn texts and of the intervals.

    Raises:
        RequestError: If there is no case.
    """
    if not cases:
        raise RequestError("no fact to write about; give facts with --facts")
    begun = time.perf_counter()
    prompts = [list(_prompts(case)) for case in cases]
    written = _written(model, prompts, seed)
    texts = [[written[prompt] for prompt in some] for some in prompts]
    values = {"fluency": tuple(sum(map(fluency, some)) / len(some) for some in texts)}
    pairs = [(said, true) for said, true in zip(texts, told or [()] * len(cases), strict=True) if true]
    if pairs:
        values["consistency"] = tuple(consistency(said, true) for said, true in pairs)
    requests = [request for case in cases for request in case.final_requests]
    return AbilityScores(
        "fluency",
        TITLE,
        VERSION,
        {name: mean_interval(found, seed) for name, found in values.items()},
        values,
        len(cases),
        facts_hash(requests),
        None,
        time.perf_counter() - begun,
    )


def _prompts(case: EditCase) -> tuple[str, ...]:
    return case.generation_prompts[:PROMPTS] or tuple(r.text for r in case.final_requests[:PROMPTS])


def _written(model: EditableModel, prompts: Sequence[Sequence[str]], seed: int) -> dict[str, str]:
    """The text behind every distinct prompt; the same set of prompts and seed give the same texts."""
    distinct = sorted({prompt for some in prompts for prompt in some})
    found = model.generate(distinct, TOKENS, do_sample=True, seed=seed) if distinct else []
    return dict(zip(distinct, found, strict=True))
