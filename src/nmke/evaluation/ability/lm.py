"""Our model as the harness sees it: log-likelihoods and generations from text.

Differs from the harness's own wrapper of transformers models: text becomes tokens by the one rule of this package
(special tokens, the space between prompt and answer), logits are made only where an answer stands, and answers of
one token behind the same prompt share one forward pass. Memory stays bounded whatever the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lm_eval.api.model import LM

from nmke.evaluation.perplexity import text_windows
from nmke.evaluation.target_scores import TOKEN_BUDGET, TargetRow, next_token_scores, score_rows
from nmke.models.generate import Decoding, continue_prompts
from nmke.models.load import EditableModel

GENERATED_TOKENS = 256


class HarnessModel(LM):
    """An `EditableModel` behind the harness's interface.

    Args:
        model: The model as it is now.
        token_budget: Largest number of tokens in a batch.
    """

    def __init__(self, model: EditableModel, token_budget: int = TOKEN_BUDGET) -> None:
        super().__init__()
        self.model, self.token_budget = model, token_budget

    def loglikelihood(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
        """Log-probability of each answer behind its prompt, and whether greedy decoding would give it."""
        pairs = [self._tokens(*request.args) for request in requests]
        found: dict[int, tuple[float, bool]] = {}
        contexts: dict[tuple[int, ...], list[int]] = {}
        for index, (context, answer) in enumerate(pairs):
            if len(answer) == 1:
                contexts.setdefault(context, []).append(index)
        options = [[pairs[i][1][0] for i in indices] for indices in contexts.values()]
        for indices, scores in zip(
            contexts.values(),
            next_token_scores(self.model, list(contexts), options, self.token_budget),
            strict=True,
        ):
            found.update(zip(indices, scores, strict=True))
        longer = [index for index in range(len(pairs)) if index not in found]
        rows = [TargetRow((*pairs[i][0], *pairs[i][1]), len(pairs[i][1])) for i in longer]
        for index, hit in zip(longer, score_rows(self.model, rows, self.token_budget), strict=True):
            found[index] = (hit.log_prob, hit.predicted == hit.target)
        return [found[index] for index in range(len(pairs))]

    def generate_until(self, requests: Sequence[Any], **_: Any) -> list[str]:
        """Greedy answers, cut before the first stop string."""
        prompts = [request.args[0] for request in requests]
        settings = requests[0].args[1]
        decoding = Decoding(
            int(settings.get("max_gen_toks", GENERATED_TOKENS)), stop=tuple(settings.get("until", ()))
        )
        return continue_prompts(self.model, prompts, decoding)

    def loglikelihood_rolling(self, requests: Sequence[Any], **_: Any) -> list[float]:
        """Log-probability of whole texts, in windows as for `nmke.evaluation.perplexity`."""
        found = []
        for request in requests:
            rows = text_windows(self.model, [request.args[0]])
            found.append(sum(hit.log_prob for hit in score_rows(self.model, rows, self.token_budget)))
        return found

    def _tokens(self, context: str, answer: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Ids of prompt and answer; a prompt too long for the model loses its beginning."""
        encoder = self.model.encoder
        before, after = encoder.encode(context), encoder.encode_target(context, answer)
        limit, start = self.model.context_length, encoder.prefix_ids
        if limit is not None and len(before) + len(after) > limit:
            room = limit - len(after) - len(start)
            before = [*start, *before[len(before) - room :]]
        return tuple(before), tuple(after)
