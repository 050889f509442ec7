"""Laws of every registered method, in both types of weights: what was done can be proved and taken back."""

import itertools
from pathlib import Path

import pytest
import torch
from tests import runs
from tests.tiers import sampled
from torch import Tensor

from nmke.editors import methods
from nmke.errors import ConfigError, LedgerError, NumericsError
from nmke.models.load import EditableModel
from nmke.session import EditSession
from nmke.stats.store import StatsStore

DTYPES = (torch.float32, torch.bfloat16)
FACTS = runs.facts(3)
ALSO_FLOAT32 = ("nmke", "nmke-linear", "wise")
SEVERAL = [name for name in methods.names() if methods.get(name).max_batch is None]


@pytest.fixture(scope="module")
def store() -> StatsStore:
    return runs.shared_store()


def logits(model: EditableModel) -> Tensor:
    ids = torch.tensor([model.encoder.encode(FACTS[0].text)])
    with torch.inference_mode():
        return model.model(input_ids=ids, use_cache=False).logits


def begin(path: Path, store: StatsStore, name: str, dtype: torch.dtype, **changes: object) -> EditSession:
    settings = {
        "method": name,
        "batch_size": 1,
        "layers": runs.LAYERS[: methods.get(name).max_layers],
        **changes,
    }
    return runs.open_run(path, runs.model(dtype), store=store, **settings)


EVERY = itertools.product(methods.names(), DTYPES)  # bfloat16 is the harder one


@pytest.mark.parametrize(
    ("name", "dtype"), sampled(EVERY, lambda one: one[1] is torch.bfloat16 or one[0] in ALSO_FLOAT32), ids=str
)
def test_undo_revert_base_and_replay(name: str, dtype: torch.dtype, tmp_path: Path, store: StatsStore):
    with (
        begin(tmp_path / "run", store, name, dtype) as session,
        begin(tmp_path / "two", store, name, dtype) as two,
    ):
        as_loaded, unedited, base_hash = runs.bits(session.model), logits(session.model), session.content_hash
        hashes = [r.event.hash_after for r in runs.edit_all(session, FACTS[:2])]
        assert len({base_hash, *hashes}) == 3, "every batch changes the model"
        edited = logits(session.model)
        assert not torch.equal(edited, unedited)
        with session.base():
            assert torch.equal(logits(session.model), unedited)
        assert torch.equal(logits(session.model), edited)

        assert session.undo().hash_after == hashes[0]
        assert [r.event.hash_after for r in runs.edit_all(session, FACTS[1:2])] == hashes[1:]
        assert session.revert(FACTS[1].id) == [] and session.content_hash == hashes[0]
        session.undo()
        assert session.content_hash == base_hash and runs.bits(session.model) == as_loaded
        session.verify()

        assert runs.bits(two.model) == as_loaded, "another model in this process is not touched"
        assert [r.event.hash_after for r in runs.edit_all(two, FACTS[:2])] == hashes


@pytest.mark.parametrize(
    "name", sampled(SEVERAL, {"nmke", "nmke-linear", "memit", "ft", "memoir"}.__contains__)
)
def test_batches_undo_to_the_same_bits(name: str, tmp_path: Path, store: StatsStore):
    with begin(tmp_path / "run", store, name, torch.bfloat16, batch_size=2) as session:
        as_loaded = runs.bits(session.model)
        runs.edit_all(session, FACTS)
        session.undo(2)
        assert runs.bits(session.model) == as_loaded


def test_mask_of_other_batches_does_not_depend_on_what_was_undone(tmp_path: Path, store: StatsStore):
    masked = {"mask": "random", "ratio": 0.3}
    with begin(tmp_path / "run", store, "alphaedit", torch.float32, **masked) as session:
        first = [r.event.hash_after for r in runs.edit_all(session, FACTS)]
        session.undo(2)
        assert [r.event.hash_after for r in runs.edit_all(session, FACTS[1:])] == first[1:]


def test_a_batch_without_a_finite_solution_leaves_everything_as_it_was(
    tmp_path: Path, store: StatsStore, monkeypatch: pytest.MonkeyPatch
):
    with begin(tmp_path / "run", store, "alphaedit", torch.float32) as session:
        runs.edit_all(session, FACTS[:1])
        before, hash_before = runs.bits(session.model), session.content_hash
        files = sorted(p.name for p in session.folder.edits.iterdir())
        with monkeypatch.context() as patched:
            patched.setattr(
                type(methods.get("alphaedit").solver), "directions", lambda *_: torch.full((1, 64), torch.nan)
            )
            with pytest.raises(NumericsError, match=r"edits e001, layer 1: the update is not finite"):
                session.edit_batch(FACTS[1:2])
        assert runs.bits(session.model) == before and session.content_hash == hash_before
        assert len(session.log()) == 1
        assert sorted(p.name for p in session.folder.edits.iterdir()) == files
        session.edit_batch(FACTS[1:2])
        session.verify()


def test_a_write_that_is_not_finite_leaves_every_layer_as_it_was(
    tmp_path: Path, store: StatsStore, monkeypatch: pytest.MonkeyPatch
):
    from nmke import writing
    from nmke.types import LayerUpdate

    with begin(tmp_path / "run", store, "memit", torch.float32) as session:
        before = runs.bits(session.model)
        whole = writing.compute_updates

        def broken(*arguments: object, **more: object) -> object:
            result = whole(*arguments, **more)
            first, second = result.updates
            bad = LayerUpdate(second.layer, torch.full_like(second.left, 3e38), second.right * 1e30)
            object.__setattr__(result, "updates", (first, bad))
            return result

        monkeypatch.setattr(writing, "compute_updates", broken)
        with pytest.raises(NumericsError):
            session.edit_batch(FACTS[:1])
        assert runs.bits(session.model) == before and session.log() == []


def test_editing_while_the_base_is_swapped_in_is_refused(tmp_path: Path, store: StatsStore):
    with begin(tmp_path / "run", store, "alphaedit", torch.float32) as session:
        runs.edit_all(session, FACTS[:1])
        edited = session.content_hash
        with session.base(), pytest.raises(LedgerError, match="base"):
            session.edit_batch(FACTS[1:2])
        assert session.content_hash == edited


def test_a_later_session_on_the_same_model_object_starts_from_the_base(tmp_path: Path, store: StatsStore):
    model = runs.model()
    as_loaded = runs.bits(model)
    with runs.open_run(tmp_path / "one", model, store=store) as session:
        runs.edit_all(session, FACTS)
        edited, content = runs.bits(model), session.content_hash
    assert runs.bits(model) == edited, "closing leaves the edited weights"
    with runs.open_run(tmp_path / "two", model, store=store) as session:
        assert runs.bits(model) == as_loaded and session.changed() == []
    with runs.open_run(tmp_path / "one", model, store=store) as session:
        assert session.content_hash == content and runs.bits(model) == edited


def test_rome_refuses_two_facts_at_once(tmp_path: Path, store: StatsStore):
    with (
        begin(tmp_path / "run", store, "rome", torch.float32) as session,
        pytest.raises(ConfigError, match="takes batches of 1, 2 asked"),
    ):
        session.edit_batch(FACTS[:2])
