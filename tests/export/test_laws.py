"""Export then load equals the session, for every registered method."""

from pathlib import Path

import pytest
from tests.export.runs import PROMPTS, SETTINGS, tiny_base
from tests.tiers import sampled
from tests.tiny import tiny_llama

from nmke.config import EditConfig
from nmke.editors import methods
from nmke.export import exporters
from nmke.export.base import largest_difference
from nmke.export.delta import apply_delta
from nmke.models.cache import weights_fingerprint
from nmke.models.load import load_model
from nmke.session import EditSession
from nmke.stats.store import StatsStore
from nmke.types import EditRequest

FACT = EditRequest("The capital of {} is", "France", "Rome", id="france")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base(tmp_path_factory.mktemp("laws") / "llama", tiny_llama)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> StatsStore:
    return StatsStore(tmp_path_factory.mktemp("stats"))


WRITE = [name for name in methods.names() if methods.get(name).recall is None]


@pytest.mark.parametrize(
    "method", sampled(WRITE, {"nmke", "nmke-linear", "alphaedit", "kn", "lora"}.__contains__)
)
def test_export_then_load_equals_the_session(
    method: str, base: Path, store: StatsStore, tmp_path: Path
) -> None:
    plain = {name: SETTINGS[name] for name in ("corpus_tokens", "context_tokens", "layers", "steps")}
    plain |= {"null_space": "share", "null_space_value": 0.5, "on_collapse": "continue"}
    config = EditConfig.create(method=method, batch_size=1, **plain)
    model = load_model(str(base), device="cpu")
    with EditSession.open(model, tmp_path / "run", config=config, store=store) as session:
        session.edit_batch([FACT])
        assert session.changed()
        edited = weights_fingerprint(session.model.model)
        for name in ("hf", "delta"):
            report = exporters.get(name)(session, tmp_path / name)
            assert report.content_hash == session.content_hash
        for loaded in (
            load_model(str(tmp_path / "hf"), device="cpu"),
            apply_delta(tmp_path / "delta", str(base)),
        ):
            assert weights_fingerprint(loaded.model) == edited
            assert largest_difference(session.model, loaded, PROMPTS) <= 1e-5
