"""The prompts that requests are attributed on: token rows, the token at which neurons are scored, and the answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from nmke.attribution import Readout
from nmke.attribution.parts import read_rows
from nmke.config import AttributionTarget, AttributionToken
from nmke.editors.rows import PromptRow, prompt_rows
from nmke.errors import RequestError
from nmke.models.load import EditableModel
from nmke.types import EditRequest


@dataclass(frozen=True)
class ScoredPrompts:
    """Prompts ready to be read.

    Args:
        rows: Their tokens, in the order of the requests.
        owners: Per row, the index of its request.
        columns: Index of the token at which neurons are scored; None for the last one.
        targets: The token whose log-probability is attributed; None for what the model predicts.
    """

    rows: tuple[PromptRow, ...]
    owners: tuple[int, ...]
    columns: tuple[int, ...] | None
    targets: tuple[int, ...] | None

    def read(self, model: EditableModel, layers: Sequence[int]) -> Readout:
        """Run them through the model as it is now."""
        ids = [row.ids for row in self.rows]
        targets = None if self.targets is None else torch.tensor(self.targets, device=model.device)
        return read_rows(model, ids, layers, self.columns, targets)


def scored_prompts(
    model: EditableModel,
    requests: Sequence[EditRequest],
    contexts: Sequence[str],
    token: AttributionToken,
    target: AttributionTarget,
) -> ScoredPrompts:
    """Every context times every prompt, without rows whose subject is the model's first token.

    Args:
        model: The model that reads them.
        requests: What is attributed.
        contexts: Prefixes, the first one empty.
        token: Where neurons are scored.
        target: Whose log-probability is attributed.

    Raises:
        RequestError: If a prompt does not fit the model, or the old answer is asked for and unknown.
    """
    found = [
        (owner, row)
        for owner, request in enumerate(requests)
        for row in prompt_rows(model, request, contexts)
    ]
    rows, owners = tuple(row for _, row in found), tuple(owner for owner, _ in found)
    columns = tuple(row.anchor for row in rows) if token == "subject" else None
    targets: tuple[int, ...] | None = None
    if target != "predicted":
        first = [model.encoder.encode_target(r.text, _answer(r, target))[0] for r in requests]
        targets = tuple(first[owner] for owner in owners)
    return ScoredPrompts(rows, owners, columns, targets)


def _answer(request: EditRequest, target: AttributionTarget) -> str:
    if target == "new":
        return request.target_new
    if not request.target_true:
        raise RequestError(
            f"edit {request.id!r}: the old answer is to be attributed and none is given; add `target_true`, "
            "or attribute the model's guess (attribution_target 'predicted')"
        )
    return request.target_true
