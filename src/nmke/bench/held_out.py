"""Perplexity and KL to the unedited model on text that no edit is about."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

from nmke.bench.record import HeldOut
from nmke.evaluation.held_out import read_articles, wikitext_path
from nmke.evaluation.perplexity import text_windows
from nmke.evaluation.target_scores import TargetRow
from nmke.health import Reading, divergence, heldout_texts, perplexity_of, read
from nmke.models.load import EditableModel

KL_POSITIONS = 256


class HeldOutText:
    """The first tokens of WikiText-2's test part, or our own sentences where it is not on this machine.

    Args:
        model: The model, edited or not.
        tokens: About how many tokens to read.
    """

    def __init__(self, model: EditableModel, tokens: int) -> None:
        self._model = model
        path = wikitext_path()
        texts: Sequence[str] = heldout_texts() if path is None else read_articles(path)
        self.name = "nmke-heldout" if path is None else "wikitext2-test"
        self._rows: list[TargetRow] = text_windows(model, texts, max_tokens=tokens)
        ids = ",".join(str(token) for row in self._rows for token in row.ids)
        self.sha256 = hashlib.sha256(ids.encode()).hexdigest()
        self._base: Reading | None = None

    def measure(self, base: Callable[[], AbstractContextManager[None]]) -> HeldOut:
        """The model as it is now against the unedited one, which is read once.

        Args:
            base: Context in which the model is unedited.
        """
        if self._base is None:
            with base():
                self._base = read(self._model, self._rows, KL_POSITIONS)
        now = read(self._model, self._rows, KL_POSITIONS)
        return HeldOut(
            text=self.name,
            sha256=self.sha256,
            tokens=sum(row.n_target for row in self._rows),
            perplexity=perplexity_of(now.loss),
            perplexity_base=perplexity_of(self._base.loss),
            kl=divergence(self._base.log_probs, now.log_probs),
            kl_positions=len(now.log_probs),
        )
