"""The published formulas as they are written, to be timed and compared beside ours in the same run."""

from __future__ import annotations

import torch
from torch import Tensor


def scores_of_one_prompt(
    values: Tensor, unembedding: Tensor, base: Tensor, target: Tensor, steps: Tensor, chunk: int
) -> Tensor:
    """NMKE's log-probability increase of every neuron for one prompt: one [m, d] x [d, V] product and softmax.

    Args:
        values: What each neuron writes behind the frozen norm, [m, d].
        unembedding: [V, d].
        base: Logits before, [V].
        target: The answer's token.
        steps: Of each neuron, [m].
        chunk: Neurons whose logits are held at once; the released code goes neuron by neuron in parts too.
    """
    before = torch.log_softmax(base.float(), 0)[target]
    found = []
    for start in range(0, len(values), chunk):
        at = slice(start, start + chunk)
        logits = base.float() + ((steps[at, None].to(values) * values[at]) @ unembedding.T).float()
        found.append(torch.log_softmax(logits, dim=1)[:, target] - before)
    return torch.cat(found)


def alphaedit_update(projector: Tensor, keys: Tensor, past: Tensor, residuals: Tensor, l2: float) -> Tensor:
    """(P(K Kᵀ + Cp) + λI)⁻¹ P K Rᵀ by a dense, non-symmetric solve, arXiv:2410.02355, eq. 14."""
    system = projector @ (keys @ keys.T + past) + l2 * torch.eye(
        len(keys), dtype=keys.dtype, device=keys.device
    )
    return torch.linalg.solve(system, projector @ keys @ residuals.T)


def memit_directions(moment: Tensor, keys: Tensor, past: Tensor, weight: float, l2: float) -> Tensor:
    """(w0·C0 + Cp + λI)⁻¹ K, factored anew for every batch."""
    system = weight * moment + past
    system.diagonal().add_(l2)
    return torch.linalg.solve(system, keys)
