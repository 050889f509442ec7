"""Perplexity and KL to the unedited model on text that no edit is about."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

from nmke.bench.record import HeldOut
from nmke.evaluation.perplexity import text_windows
from nmke.evaluation.target_scores import TargetRow
from nmke.facts import data_path
from nmke.health import Reading, divergence, heldout_texts, perplexity_of, read
from nmke.models.load import EditableModel
from nmke.stats.corpus import read_corpus

WIKITEXT = "text_wikitext2_test.jsonl"
WINDOW = 512  # tokens
KL_POSITIONS = 256
_CHARACTERS = 8  # read per token wanted: more than any tokenizer needs


class HeldOutText:
    """The first tokens of WikiText-2's test part, or our own sentences where it is not on this machine.

    Args:
        model: The model, edited or not.
        tokens: About how many tokens to read.
    """

    def __init__(self, model: EditableModel, tokens: int) -> None:
        self._model = model
        path = data_path(WIKITEXT)
        texts: Sequence[str] = heldout_texts()
        if path is not None:
            texts = read_corpus(str(path), tokens * _CHARACTERS).texts
        self.name = "nmke-heldout" if path is None else "wikitext2-test"
        self._rows: list[TargetRow] = text_windows(model, texts, WINDOW, tokens)
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
