"""What the unedited model says on the neighbours, computed once and kept beside a run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from nmke.damage import load_json
from nmke.errors import LedgerError, RequestError
from nmke.evaluation.target_scores import TOKEN_BUDGET, Pair, predictions
from nmke.models.load import EditableModel
from nmke.types import EditRequest, Neighbor

SCHEMA = "nmke.base_outputs/1"
CONTINUATION_TOKENS = 8


@dataclass(frozen=True)
class BaseOutputs:
    """The unedited model's outputs that locality is measured against.

    Args:
        predicted: Argmax token ids of each neighbour prompt with its answer fed.
        continuations: Greedy continuation of each neighbour prompt whose answer nobody knows.
        facts: `facts_hash` of the requests they were collected for; any part of these can be scored.
        model: Fingerprint of the unedited weights, if the caller gave one.
    """

    predicted: Mapping[Pair, tuple[int, ...]]
    continuations: Mapping[str, str]
    facts: str
    model: str = ""

    def pair(self, request: EditRequest, neighbor: Neighbor) -> Pair:
        """The neighbour's prompt, and the answer that is fed to measure it.

        Raises:
            RequestError: If the neighbour is not among those collected.
        """
        answer = neighbor.answer or request.target_true or self.continuations.get(neighbor.prompt)
        pair = (neighbor.prompt, answer or "")
        if pair not in self.predicted:
            raise RequestError(
                f"request {request.id!r}: the base outputs do not hold neighbour {neighbor.prompt[:80]!r}; "
                "collect them from the unedited model for these facts"
            )
        return pair

    def save(self, path: Path) -> None:
        """Write the outputs as one JSON file."""
        content = {
            "schema": SCHEMA,
            "facts": self.facts,
            "model": self.model,
            "predicted": [[prompt, answer, list(ids)] for (prompt, answer), ids in self.predicted.items()],
            "continuations": dict(self.continuations),
        }
        path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> BaseOutputs:
        """Read what `save` wrote.

        Raises:
            LedgerError: If the file is missing, damaged or of another schema.
        """
        try:
            content = load_json(path.read_text(encoding="utf-8"))
            if content["schema"] != SCHEMA:
                raise ValueError(f"schema {content['schema']!r}, not {SCHEMA!r}")
            return cls(
                predicted={(prompt, answer): tuple(ids) for prompt, answer, ids in content["predicted"]},
                continuations=dict(content["continuations"]),
                facts=content["facts"],
                model=content["model"],
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise LedgerError(
                f"base outputs {str(path)!r} cannot be used ({error}); remove the file to compute them again"
            ) from error


def collect_base(
    model: EditableModel,
    requests: Sequence[EditRequest],
    *,
    token_budget: int = TOKEN_BUDGET,
    model_hash: str = "",
) -> BaseOutputs:
    """Outputs of the unedited model on every neighbour of the requests.

    A neighbour without an answer is measured on the request's true answer, else on the model's own greedy
    continuation.

    Args:
        model: The model before any edit.
        requests: All requests that will be scored, in any order.
        token_budget: Largest number of tokens in a batch.
        model_hash: Fingerprint of the unedited weights, kept in the result.
    """
    known: list[Pair] = []
    open_prompts: list[str] = []
    for request in requests:
        for neighbor in request.neighborhood:
            answer = neighbor.answer or request.target_true
            if answer:
                known.append((neighbor.prompt, answer))
            else:
                open_prompts.append(neighbor.prompt)
    continuations = _continuations(model, list(dict.fromkeys(open_prompts)))
    pairs = list(dict.fromkeys([*known, *continuations.items()]))
    scores = predictions(model, pairs, token_budget)
    predicted = {pair: score.predicted for pair, score in zip(pairs, scores, strict=True)}
    return BaseOutputs(predicted, continuations, facts_hash(requests), model_hash)


def facts_hash(requests: Sequence[EditRequest]) -> str:
    """Sha256 over every field of the requests, in their order."""
    content = json.dumps([asdict(request) for request in requests], ensure_ascii=True, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def _continuations(model: EditableModel, prompts: list[str]) -> dict[str, str]:
    """The greedy continuation of each prompt, a full stop where the model says nothing visible."""
    texts = model.generate(prompts, CONTINUATION_TOKENS) if prompts else []
    return {prompt: text if text.strip() else "." for prompt, text in zip(prompts, texts, strict=True)}
