"""The forward pass behind a readout, run again with something added at the scored token: what causal scores need.

The log-probability is that of the answer at each prompt's last token, wherever the neurons are scored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nmke.attribution.logits import log_probs_of
from nmke.models.load import EditableModel
from nmke.models.replay import AnchoredRows, Replay, open_replay
from nmke.models.tokens import length_buckets

TAIL_TOKENS = 512  # tokens that one differentiated pass holds at once


@dataclass(frozen=True)
class Rerun:
    """Prompts that can be run again from the scored token on.

    Args:
        model: The model as it was read.
        rows: Token ids of each prompt, up to its last real token; the anchor is the scored token.
        answers: The token whose log-probability at the last token is asked for, [prompts].
    """

    model: EditableModel
    rows: AnchoredRows
    answers: Int[Tensor, " prompts"]

    def open(self, prompts: Sequence[int], layers: Sequence[int]) -> Opened:
        """Some prompts, ready to be run with vectors added to the down-projections' outputs of `layers`."""
        replay = open_replay(self.model, self.rows.select(prompts), layers, "down_proj")
        return Opened(self.model, replay, self.rows.select(prompts), self.answers[list(prompts)])

    def buckets(self) -> Iterator[list[int]]:
        """Prompts with tails of like length, few enough to differentiate at once."""
        yield from length_buckets(self.rows.tail_lengths, TAIL_TOKENS)

    def gradients(
        self, layers: Sequence[int], deltas: Mapping[int, Tensor] | None = None
    ) -> dict[int, Float[Tensor, "prompts d_model"]]:
        """Gradient of the answer's log-probability by each layer's down-projection output at the scored token.

        Args:
            layers: The layers; all of them are differentiated in one pass.
            deltas: Added to those outputs first, per layer [prompts, d_model].
        """
        size = (len(self.rows.ids), self.model.layout.d_model)
        exact = torch.promote_types(self.model.dtype, torch.float32)
        start = torch.zeros(size, dtype=exact, device=self.model.device)
        found = {layer: torch.zeros_like(start) for layer in layers}
        for prompts in self.buckets():
            opened = self.open(prompts, layers)
            for layer, gradient in opened.gradients(
                {i: (deltas[i] if deltas else start)[prompts] for i in layers}
            ).items():
                found[layer][prompts] = gradient
        return found


@dataclass(frozen=True)
class Opened:
    """Prompts behind a replay; see `Rerun.open`."""

    model: EditableModel
    replay: Replay
    rows: AnchoredRows
    answers: Int[Tensor, " rows"]

    def repeated(self, times: int) -> Opened:
        """The first prompt `times` over, so that as many changes of it run at once."""
        rows = [0] * times
        return Opened(self.model, self.replay.select(rows), self.rows.select(rows), self.answers[rows])

    def log_probs(self, deltas: Mapping[int, Float[Tensor, "rows d_model"]]) -> Float[Tensor, " rows"]:
        """Log-probability of each answer with `deltas` added at the scored token, nats."""
        finals = self.replay.run(deltas)
        last = torch.tensor(self.rows.tail_lengths, device=finals.device) - 1
        hidden = finals[torch.arange(len(last), device=finals.device), last]
        return log_probs_of(self.model.layout, hidden, self.answers)

    @torch.enable_grad()
    def gradients(
        self, at: Mapping[int, Tensor], of: Callable[[Tensor], Tensor] = lambda log_p: log_p
    ) -> dict[int, Float[Tensor, "rows d_model"]]:
        """Gradient of the log-probabilities, or of a function of each, by the deltas, at the deltas given."""
        leaves = {layer: delta.detach().clone().requires_grad_() for layer, delta in at.items()}
        found = torch.autograd.grad(of(self.log_probs(leaves)).sum(), list(leaves.values()))
        return dict(zip(leaves, found, strict=True))
