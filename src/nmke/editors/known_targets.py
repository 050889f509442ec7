"""Targets of an unedited model that were found before: methods compared on the same facts need them sought only once.

Target values depend on the weights, the facts, the contexts and a few settings, not on how a method writes them. All
that the optimisation reads is part of the key, so that what is found again has the same bits.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Sequence
from typing import Protocol

from nmke.config import EditConfig
from nmke.editors.targets import SETTINGS, Targets, optimise_targets
from nmke.models.load import EditableModel
from nmke.models.replay import Site
from nmke.progress import Progress, quiet
from nmke.types import EditRequest

KEPT = 8  # batches; one of 100 facts in five layers of d_model 4096 is 16 MB


class FindTargets(Protocol):
    """`optimise_targets`, or what stands in for it here."""

    def __call__(
        self,
        model: EditableModel,
        requests: Sequence[EditRequest],
        contexts: Sequence[str],
        layers: Sequence[int],
        site: Site,
        config: EditConfig,
        progress: Progress = quiet,
        *,
        held: Sequence[EditRequest] = (),
    ) -> Targets:
        """Target values of a batch; the model is not changed."""
        ...


def given(targets: Targets) -> FindTargets:
    """Stands in for `optimise_targets` where a batch's targets are known; the caller answers for them."""
    return lambda *_args, **_more: targets


class KnownTargets:
    """Stands in for `optimise_targets` while a model is unedited; keeps the newest batches in memory."""

    def __init__(self) -> None:
        self._found: OrderedDict[str, Targets] = OrderedDict()
        self.reused = 0

    def __call__(
        self,
        model: EditableModel,
        requests: Sequence[EditRequest],
        contexts: Sequence[str],
        layers: Sequence[int],
        site: Site,
        config: EditConfig,
        progress: Progress = quiet,
        *,
        held: Sequence[EditRequest] = (),
    ) -> Targets:
        """What `optimise_targets` gives, or gave; the caller answers for the model being as it was loaded."""
        asked = {
            "model": [model.fingerprint, str(model.dtype), str(model.device)],
            "facts": [[_content(one) for one in some] for some in (requests, held)],
            "contexts": list(contexts),
            "sites": [site, *layers],
            "settings": [getattr(config, name) for name in SETTINGS],
        }
        key = hashlib.sha256(json.dumps(asked).encode()).hexdigest()
        if key in self._found:
            self.reused += 1
            self._found.move_to_end(key)
        else:
            self._found[key] = optimise_targets(
                model, requests, contexts, layers, site, config, progress, held=held
            )
        if len(self._found) > KEPT:
            self._found.popitem(last=False)
        return self._found[key]


def _content(request: EditRequest) -> list[str]:
    """What decides the rows of a request; a bare one has fewer of them."""
    return [type(request).__name__, request.prompt, request.subject, request.target_new]
