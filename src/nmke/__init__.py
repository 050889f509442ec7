"""Edit facts in open-weights language models through neuron masks: lifelong, measured, reversible."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nmke.config import EditConfig
    from nmke.health import HealthReport
    from nmke.models.load import EditableModel, load_model
    from nmke.session import BatchReport, EditSession
    from nmke.types import EditRequest, Neighbor

__version__ = "0.1.0"

__all__ = [
    "BatchReport",
    "EditConfig",
    "EditRequest",
    "EditSession",
    "EditableModel",
    "HealthReport",
    "Neighbor",
    "load_model",
]

# Public names and where they live; imported when first used, so that `import nmke` does not import torch.
_HOMES = {
    "BatchReport": "nmke.session",
    "EditConfig": "nmke.config",
    "EditRequest": "nmke.types",
    "EditSession": "nmke.session",
    "EditableModel": "nmke.models.load",
    "HealthReport": "nmke.health",
    "Neighbor": "nmke.types",
    "load_model": "nmke.models.load",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'nmke' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
