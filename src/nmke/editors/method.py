"""The contracts of an editing method: what a solver gets and gives, and what a method is made of.

Every solver answers one question: along which directions in key space should the residuals be written?
With keys K and residuals R the update is ΔW = Rᵀ X, so that the solver needs only the keys: X [edits, d_mlp].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from nmke.config import EditConfig
from nmke.editors.memory import KeyMemory
from nmke.masking.per_edit import suits_edit
from nmke.registry import Registry
from nmke.stats.covariance import LayerStats
from nmke.types import Keys, Mask

Directions = Float[Tensor, "edits d_mlp"]

STATISTICS = "key statistics"  # what an entry may need: the second moment of ordinary keys, per edited layer


@runtime_checkable
class Solver(Protocol):
    """Pure linear algebra of a method."""

    def directions(
        self, keys: Keys, stats: LayerStats, memory: KeyMemory, keep: Mask | None, config: EditConfig
    ) -> Directions:
        """Rows X with ΔW = Rᵀ X.

        Args:
            keys: Keys of this batch, float64.
            stats: The layer's ordinary keys.
            memory: Keys of earlier edits.
            keep: Neurons that may change; None means all. A solver that cannot honour it in its system
                returns zeros in the other columns.
            config: Resolved settings.

        Returns:
            Float64 [edits, d_mlp].

        Raises:
            NumericsError: If a system is not finite or ill-conditioned.
        """
        ...


@dataclass(frozen=True)
class Method:
    """A locate-then-edit method: a solver and the settings that are its own.

    Args:
        solver: Its linear algebra.
        defaults: Settings that differ from `EditConfig`'s defaults.
        max_batch: Largest batch it is defined for (1 for ROME), None for any.
        max_layers: Largest number of layers it is defined for, None for any.
        remembers: Whether the keys of earlier edits enter its system.
        edit_masks: Whether it can take a mask for each edit of a batch (`mask_scope` "edit").
        batch_defaults: What takes the place of `defaults` when the mask asked for is one of a whole batch.
    """

    solver: Solver
    defaults: Mapping[str, Any] = field(default_factory=dict)
    max_batch: int | None = None
    max_layers: int | None = None
    remembers: bool = True
    edit_masks: bool = False
    batch_defaults: Mapping[str, Any] = field(default_factory=dict)

    def fill(self, config: EditConfig) -> EditConfig:
        """The settings with the method's own wherever nothing was asked for."""
        filled = config.filled(dict(self.defaults))
        asked = "mask_scope" in config.model_fields_set
        if filled.mask_scope == "edit" and (asked or suits_edit(filled)):
            return filled
        return config.filled({**self.defaults, **self.batch_defaults})


methods: Registry[Method] = Registry("method")
