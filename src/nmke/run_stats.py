"""The key statistics that a session has loaded; each kind is read or gathered once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

from nmke.config import EditConfig
from nmke.editors.norm_anchor import NORM_ANCHOR, pilot_norms
from nmke.editors.pipeline import target_site
from nmke.models.load import EditableModel
from nmke.progress import Progress
from nmke.stats.covariance import LARGEST_EXACT, KeyCovariance, LayerStats, OrdinaryInputs
from nmke.stats.store import INPUT_KINDS, CorpusSpec, StatsStore
from nmke.types import Gram


class RunStats:
    """Statistics by layer, corpus and null space.

    Args:
        model: The session's model.
        base: Context in which it is unedited: statistics are those of the unedited weights.
        store: Cache on disk.
    """

    def __init__(
        self, model: EditableModel, base: Callable[[], AbstractContextManager[None]], store: StatsStore
    ) -> None:
        self._model, self._base, self._store = model, base, store
        self._loaded: dict[tuple[object, ...], LayerStats] = {}
        self._inputs: dict[tuple[int, CorpusSpec], OrdinaryInputs] = {}
        self._anchors: dict[EditConfig, dict[int, float]] = {}

    def of(self, config: EditConfig, progress: Progress) -> dict[int, LayerStats]:
        """Statistics of each layer that `config` edits."""
        assert config.layers is not None
        spec = CorpusSpec.of(config)
        rule, value = config.null_space, config.null_space_value
        keys = {layer: (layer, spec, rule, value) for layer in config.layers}
        missing = [layer for layer, key in keys.items() if key not in self._loaded]
        if missing:
            with self._base():
                gathered = self._store.prepare(self._model, missing, spec, progress)
            for layer, covariance in gathered.items():
                held = self._held(layer, covariance, spec)
                self._loaded[keys[layer]] = LayerStats(held, rule, value)
        return {layer: self._loaded[key] for layer, key in keys.items()}

    def _held(self, layer: int, covariance: KeyCovariance, spec: CorpusSpec) -> Gram | Callable[[], Gram]:
        """The layer's moment, or for a large one how to read it from the cache."""
        if len(covariance.total) <= LARGEST_EXACT:
            return covariance.moment.to(self._model.device)
        key = self._store.keys_for(self._model, [layer], spec)[layer]

        def read() -> Gram:
            found = self._store.load(key)
            assert found is not None
            return found.moment.to(self._model.device)

        return read

    def inputs(self, config: EditConfig, progress: Progress) -> dict[int, OrdinaryInputs]:
        """What the MLPs of each layer that `config` edits are given by ordinary text, and at ordinary subjects.

        Raises:
            LayoutError: If the model does not show what its neurons read.
        """
        assert config.layers is not None
        spec = CorpusSpec.of(config)
        missing = [layer for layer in config.layers if (layer, spec) not in self._inputs]
        if missing:
            with self._base():
                text, subjects = (
                    self._store.prepare(self._model, missing, spec, progress, kind) for kind in INPUT_KINDS
                )
            for layer in missing:
                both = (found[layer].moment.to(self._model.device) for found in (text, subjects))
                self._inputs[layer, spec] = OrdinaryInputs(*both)
        return {layer: self._inputs[layer, spec] for layer in config.layers}

    def anchors(self, config: EditConfig, contexts: Sequence[str], progress: Progress) -> dict[int, float]:
        """The norm that target values are rescaled to, per layer; empty unless the settings ask for it."""
        if NORM_ANCHOR not in config.stabilisers:
            return {}
        if config not in self._anchors:
            assert config.layers is not None
            site = target_site(self._model, config, config.layers)
            with self._base():
                self._anchors[config] = pilot_norms(self._model, contexts, site, config, progress)
        return self._anchors[config]
