"""Side memories: they are kept, hashed, restored, taken back and recalled like weights."""

from pathlib import Path

import pytest
import torch
from tests import runs
from torch import Tensor

from nmke.batch_file import read_head
from nmke.editors import methods
from nmke.editors.side import RowChanges, SideMemory, unflatten
from nmke.errors import ConfigError, ExportError, VerifyError
from nmke.export import exporters
from nmke.models.load import EditableModel
from nmke.session import EditSession
from nmke.side_state import SideState

RECALLED = [name for name in methods.names() if methods.get(name).recall is not None]
KEPT = [*RECALLED, "ultraedit"]
FACTS = runs.facts(4)


def begin(path: Path, name: str, model: EditableModel | None = None, **changes: object) -> EditSession:
    settings = {"method": name, "layers": runs.LAYERS[: methods.get(name).max_layers], **changes}
    return runs.open_run(path, model, store=runs.shared_store(), **settings)


def logits(model: EditableModel, text: str = FACTS[0].text) -> Tensor:
    ids = torch.tensor([model.encoder.encode(text)])
    with torch.inference_mode():
        return model.model(input_ids=ids, use_cache=False).logits[0, -1]


def hooks(model: EditableModel) -> int:
    modules = model.model.modules()
    return sum(len(each._forward_hooks) + len(each._forward_pre_hooks) for each in modules)


def test_every_kind_says_so_in_the_registry():
    assert set(KEPT) == {"grace", "wise", "memoir", "ike", "ultraedit"}
    assert all("side memory" in methods.entry(name).needs for name in KEPT)


@pytest.mark.parametrize("name", KEPT)
def test_a_run_opened_again_holds_the_same_memory(name: str, tmp_path: Path):
    with begin(tmp_path / "run", name) as session:
        runs.edit_all(session, FACTS)
        content, answer = session.content_hash, logits(session.model)
        head = read_head(
            session.folder.root / next(n for n in session.log()[-1].files if n.startswith("head/"))
        )
        kept = {n: t.clone() for n, t in session.weights.side.tensors().items()}
        assert kept and all(torch.equal(head[n], t) for n, t in kept.items())
    with EditSession.resume(session.folder, model=runs.model(), store=runs.shared_store()) as again:
        assert again.content_hash == content
        assert torch.equal(logits(again.model), answer)
        again.verify()
        again.undo(2)
        assert again.weights.side.tensors() == {} and again.content_hash == again.weights.base_hash()


@pytest.mark.parametrize("name", RECALLED)
def test_a_memory_is_recalled_while_the_session_is_open_and_not_in_its_base(name: str, tmp_path: Path):
    model = runs.model()
    plain, encoder = logits(model), model.encoder
    with begin(tmp_path / "run", name, model) as session:
        assert hooks(model) == 0
        runs.edit_all(session, FACTS[:2])
        assert session.changed() == [] and session.weights.side.recalled == (name,)
        edited = logits(model)
        assert not torch.equal(edited, plain)
        with session.base():
            assert torch.equal(logits(model), plain) and hooks(model) == 0
        assert torch.equal(logits(model), edited)
    assert torch.equal(logits(model), plain) and hooks(model) == 0 and model.encoder is encoder


@pytest.mark.parametrize("name", RECALLED)
def test_a_later_session_on_the_same_model_ends_the_recall_of_one_left_open(name: str, tmp_path: Path):
    model = runs.model()
    plain = logits(model)
    session = begin(tmp_path / "one", name, model)
    runs.edit_all(session, FACTS[:1])
    with begin(tmp_path / "two", "memit", model):
        assert torch.equal(logits(model), plain)
    session.close()


@pytest.mark.parametrize("name", RECALLED)
def test_only_the_same_method_goes_on_and_no_format_exports_it(name: str, tmp_path: Path):
    with begin(tmp_path / "run", name) as session:
        runs.edit_all(session, FACTS[:1])
        for export in exporters:
            with pytest.raises(ExportError, match=f"side memory of {name!r}, which no export format holds"):
                export.value(session, tmp_path / export.name)
    other = EditSession.resume(session.folder, runs.config(method="memit"), model=runs.model())
    with (
        other,
        pytest.raises(ConfigError, match=f"'memit' asked for a run that holds a side memory of {name!r}"),
    ):
        other.edit_batch(FACTS[1:2])


@pytest.mark.parametrize("name", KEPT)
def test_reverting_the_first_edit_gives_the_run_without_it(name: str, tmp_path: Path):
    with (
        begin(tmp_path / "one", name, batch_size=1) as one,
        begin(tmp_path / "two", name, batch_size=1) as two,
    ):
        runs.edit_all(one, FACTS[:3])
        one.revert(FACTS[0].id)
        runs.edit_all(two, FACTS[1:3])
        assert one.content_hash == two.content_hash


@pytest.mark.parametrize("name", RECALLED)
def test_walking_back_passes_the_memory_after_every_batch_and_returns(name: str, tmp_path: Path):
    with begin(tmp_path / "run", name, batch_size=1) as session:
        answers = []
        for fact in FACTS[:3]:
            session.edit_batch([fact])
            answers.append(logits(session.model))
        content = session.content_hash
        found = [logits(session.model) for _ in session.walk_back()]
        assert len(found) == 3 and all(map(torch.equal, reversed(found), answers))
        assert session.content_hash == content and torch.equal(logits(session.model), answers[-1])


def test_a_batch_that_cannot_be_saved_leaves_the_memory_as_it_was(tmp_path: Path, monkeypatch):
    with begin(tmp_path / "run", "grace", batch_size=1) as session:
        runs.edit_all(session, FACTS[:1])
        before, answer = session.content_hash, logits(session.model)
        with monkeypatch.context() as patched:
            patched.setattr(
                session.ledger, "append", lambda *_a, **_k: (_ for _ in ()).throw(OSError("full"))
            )
            with pytest.raises(OSError, match="full"):
                session.edit_batch(FACTS[1:2])
        assert session.content_hash == before and torch.equal(logits(session.model), answer)
        session.edit_batch(FACTS[1:2])
        session.verify()


def test_a_changed_memory_is_found_by_verify(tmp_path: Path):
    with begin(tmp_path / "run", "grace") as session:
        runs.edit_all(session, FACTS[:2])
        session.weights.side.memories["grace"].tensors["values"][0, 0] += 1
        with pytest.raises(VerifyError, match="content hash"):
            session.verify()


def test_methods_without_a_solver_refuse_masks_and_stabilisers(tmp_path: Path):
    with pytest.raises(ConfigError, match="mask 'random' does not go with method 'grace', which takes none"):
        begin(tmp_path / "one", "grace", mask="random", ratio=0.5)
    with pytest.raises(
        ConfigError, match="stabiliser 'sphere' goes with locate-then-edit methods, 'ft' is none"
    ):
        begin(tmp_path / "two", "ft", stabilisers=("sphere",))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (None, torch.ones(2, 3)),
        (torch.zeros(2, 3), torch.zeros(4, 3)),
        (torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 5.0, 3.0, 4.0])),
        (torch.tensor([0.0, 1.0]), torch.tensor([-0.0, 1.0])),
        (torch.ones(3, 2), torch.ones(1, 2)),
        (torch.ones(2, 2), torch.ones(2, 3)),
        (torch.tensor([1, 2], dtype=torch.uint8), torch.tensor([1, 2, 3], dtype=torch.uint8)),
    ],
)
def test_row_changes_lead_back_bit_for_bit(before: Tensor | None, after: Tensor):
    change = RowChanges.between(before, after)
    found = change.undo(after)
    if before is None:
        assert found is None
        return
    assert found.dtype == before.dtype and found.shape == before.shape
    assert found.numpy().tobytes() == before.numpy().tobytes()


def test_row_changes_hold_the_changed_rows_only():
    before = torch.arange(12.0).reshape(4, 3)
    after = torch.cat([before, torch.ones(2, 3)])
    after[2, 1] = 9.0
    change = RowChanges.between(before, after)
    assert (change.length, change.index.tolist(), change.rows.tolist()) == (4, [2], [[6.0, 7.0, 8.0]])


def test_names_in_files_lead_back_to_kinds():
    one, two = SideMemory("a", {"x/y": torch.ones(1)}), SideMemory("b", {"z": torch.zeros(1)})
    flat = {**one.flat(), **two.flat()}
    assert list(flat) == ["side/a/x/y", "side/b/z"]
    assert unflatten(flat) == {"a": one, "b": two}


def test_commit_and_take_back_of_one_kind_leave_the_others_alone():
    state = SideState(runs.model())
    first = SideMemory("ultraedit", {"1/count": torch.tensor([3])})
    state.commit(first)
    changes = state.commit(SideMemory("ultraedit", {"1/count": torch.tensor([4]), "2/count": torch.ones(1)}))
    assert set(changes) == {"side/ultraedit/1/count", "side/ultraedit/2/count"}
    state.take_back(changes)
    assert {n: t.tolist() for n, t in state.tensors().items()} == {"side/ultraedit/1/count": [3]}
