"""A run on a tiny model with two facts edited, for the tests of the export formats."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.tiny import save_tiny, tiny_llama
from transformers import PreTrainedModel

from nmke.config import EditConfig
from nmke.models.load import load_model
from nmke.session import EditSession
from nmke.stats.store import StatsStore
from nmke.types import EditRequest

# Large steps without much decay: the edits then move logits of about 4 by 0.2 or more, drift about 0.04.
SETTINGS = {
    "corpus_tokens": 600,
    "context_tokens": 4,
    "method": "nmke-linear",
    "layers": (0,),
    "steps": 8,
    "clamp": 3.0,
    "lr": 1.0,
    "weight_decay": 0.01,
    "attribution": "lps",
    "attribution_token": "last",
    "covariance_weight": 1000.0,
}
INITIALIZER_RANGE = 0.2
PROMPTS = ["The capital of France is", "The mother tongue of Marie Curie is"]


def tiny_base(path: Path, builder: Callable[..., PreTrainedModel] = tiny_llama, **changes: Any) -> Path:
    """Save a tiny model whose logits are not all near zero."""
    return save_tiny(path, builder, initializer_range=INITIALIZER_RANGE, **changes)


def tiny_run(root: Path, source: Path, *, dtype: str = "float32", edited: bool = True) -> EditSession:
    """Open a run in `root` on the model at `source`."""
    config = EditConfig.create(**SETTINGS)
    model = load_model(str(source), dtype=dtype, device="cpu")
    session = EditSession.open(model, root / "run", config=config, store=StatsStore(root / "stats"))
    if edited:
        facts = (("France", "Rome"), ("Japan", "Paris"))
        session.edit_batch([EditRequest("The capital of {} is", subject, new) for subject, new in facts])
        assert session.changed()
    return session
