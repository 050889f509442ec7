"""Write each edit into its own few neurons, and meet its residual there.

Source: ours. B = (w0·C0 + Cp + λI)⁻¹ K are the directions along which keys can be written without disturbing
ordinary (C0) and earlier (Cp) keys. In each edit's column only its own neurons are kept; the combination
ΔWᵀ = B (Kᵀ B + εI)⁻¹ R then meets the residuals. With every neuron kept and ε = 1 this is MEMIT's solution with
a key memory, exactly (matrix inversion lemma); with ε = 0 every residual is met.
"""

from __future__ import annotations

import torch

from nmke.config import EditConfig
from nmke.editors.memory import KeyMemory
from nmke.editors.method import Directions
from nmke.editors.ordinary import CURE as NO_SOLUTION
from nmke.editors.ordinary import ordinary_system
from nmke.editors.solve import LARGEST_CONDITION, solve_positive
from nmke.errors import NumericsError
from nmke.masking.per_edit import key_scores, select_per_edit
from nmke.stats.covariance import LayerStats
from nmke.types import Keys, NeuronMask

CURE = "raise `residual_ridge` or `l2`, or edit fewer facts at once"


def per_edit_directions(
    keys: Keys, stats: LayerStats, memory: KeyMemory, config: EditConfig, seed: int = 0
) -> tuple[Directions, NeuronMask | None]:
    """Rows X with ΔW = Rᵀ X, [edits, d_mlp], and the neurons that any of the edits writes into.

    Args:
        keys: Keys of this batch, float64.
        stats: The layer's ordinary keys.
        memory: Keys of earlier edits.
        config: Mask settings, `covariance_weight`, `l2` and `residual_ridge`.
        seed: Seed of random masks.

    Raises:
        NumericsError: If a system is not finite or ill-conditioned.
    """
    directions = write_directions(keys, stats, memory, config)
    scores = key_scores.get(config.attribution)(keys, directions, stats.mean_squares)
    masks = select_per_edit(scores, config, seed)
    found = meet_residuals(directions * masks.keep, keys, config.residual_ridge)
    if config.mask == "none":
        return found, None
    return found, NeuronMask(masks.keep.any(dim=0), masks.detail)


def write_directions(keys: Keys, stats: LayerStats, memory: KeyMemory, config: EditConfig) -> Directions:
    """(w0·C0 + Cp + λI)⁻¹ k of every key, as rows [edits, d_mlp]; see `nmke.editors.ordinary`."""
    if memory.gram is None:
        return ordinary_system(stats, config).solve(keys, memory.rows)
    assert config.covariance_weight is not None and config.l2 is not None
    system = config.covariance_weight * stats.moment.to(keys) + memory.moment().to(keys)
    system.diagonal().add_(config.l2)
    return solve_positive(system, keys.T, what="w0·C0 + Cp + λI", cure=NO_SOLUTION).T


def meet_residuals(directions: Directions, keys: Keys, ridge: float) -> Directions:
    """(Kᵀ B + εI)⁻ᵀ Bᵀ: the combinations of the rows of `directions` that answer each key with its residual.

    Args:
        directions: [edits, d_mlp], zero where an edit may not write.
        keys: [edits, d_mlp].
        ridge: ε.

    Raises:
        NumericsError: If two edits cannot be told apart by the neurons they may write into.
    """
    system = keys @ directions.T
    system.diagonal().add_(ridge)
    condition = float(torch.linalg.cond(system)) if bool(torch.isfinite(system).all()) else float("inf")
    if not condition < LARGEST_CONDITION:
        raise NumericsError(f"Kᵀ B + εI has condition number {condition:.0e}: {CURE}")
    return torch.linalg.solve(system.T, directions)
