"""Runs on tiny models: the model, facts, quick settings and sessions that the tests of runs share."""

import atexit
import copy
import shutil
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from tests import tiny
from transformers import PreTrainedModel

from nmke.config import EditConfig
from nmke.editors.memory import SolverState
from nmke.models.load import EditableModel
from nmke.session import BatchReport, EditSession
from nmke.stats.store import StatsStore
from nmke.types import EditRequest

LAYERS = (1, 2)
QUICK = {
    "layers": LAYERS,
    "batch_size": 2,
    "steps": 4,
    "lr": 2.0,
    "clamp": 8.0,
    "weight_decay": 0.01,
    "null_space": "share",
    "null_space_value": 0.6,
    "covariance_weight": 0.1,
    "context_tokens": 3,
    "corpus_tokens": 400,
    "health_every": 0,
}
TAKES = {"steps": 8, "lr": 4.0, "clamp": 16.0}  # most facts take, however a processor rounds
SUBJECTS = ("France", "Italy", "Japan", "Peru", "Kenya", "Norway", "Chile", "Nepal", "Cuba", "Ghana")
ANSWERS = ("the", "of", "is", "in")  # one token each, so that some edits take


def loud_llama(gain: float = 8.0, **changes: object) -> PreTrainedModel:
    """A tiny Llama of four layers whose weight matrices are larger, so that its answers are no coin tosses."""
    model = tiny.tiny_llama(**{"num_hidden_layers": 4, **changes})
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(gain)
    return model


def model(dtype: torch.dtype = torch.float32, d_mlp: int = tiny.D_MLP) -> EditableModel:
    """A fresh tiny model."""
    return copy.deepcopy(_probed(dtype, d_mlp))


@cache
def _probed(dtype: torch.dtype, d_mlp: int) -> EditableModel:
    tokenizer = tiny.tiny_tokenizer()
    loud = loud_llama(vocab_size=len(tokenizer), intermediate_size=d_mlp)
    return EditableModel.wrap(loud.to(dtype), tokenizer)


def facts(count: int, prompt: str = "The train had left for {}") -> list[EditRequest]:
    """Made-up facts, each about another subject; the prompt ends in it, so that edits take."""
    names = [f"{SUBJECTS[i % 10]}{'' if i < 10 else i}" for i in range(count)]
    return [EditRequest(prompt, name, ANSWERS[i % 4], id=f"e{i:03d}") for i, name in enumerate(names)]


def config(**changes: object) -> EditConfig:
    """Quick settings."""
    return EditConfig.create(**{**QUICK, "method": "alphaedit", **changes})


@cache
def shared_store() -> StatsStore:
    """Statistics are the same for every run on equal weights, so they are gathered once in a process of tests."""
    folder = tempfile.mkdtemp(prefix="nmke-tests-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return StatsStore(Path(folder))


def open_run(
    run: Path, source: EditableModel | None = None, *, store: StatsStore | None = None, **changes: object
) -> EditSession:
    """A session on a tiny model; statistics are shared by all that give no store of their own."""
    kept = store or shared_store()
    return EditSession.open(source or model(), run, config=config(**changes), store=kept)


def edit_all(session: EditSession, requests: Sequence[EditRequest], **more: object) -> list[BatchReport]:
    """Edit all of them."""
    return list(session.edit_many(requests, **more))


def live_state(session: EditSession) -> SolverState:
    """What the session remembers of its edits."""
    return session._writer._memory.state()


def copied(source: EditableModel) -> EditableModel:
    """The model as it would be loaded again."""
    return copy.deepcopy(source)


def bits(source: EditableModel) -> dict[str, bytes]:
    """Every weight, as bytes."""
    state = source.model.state_dict().items()
    return {name: t.contiguous().flatten().view(torch.uint8).numpy().tobytes() for name, t in state}
