"""What a method needs of ordinary text is told by kind, gathered once, and gathered on the unedited weights."""

from pathlib import Path

import pytest
from tests import runs, tiny
from tests.models.families import tiny_family

from nmke.batches import resolve
from nmke.cli.estimates import prepare_cost
from nmke.config import EditConfig, replace_config
from nmke.errors import LayoutError
from nmke.models.load import EditableModel
from nmke.preparing import files, gather, lacking, needed, prepare_session
from nmke.stats.store import CorpusSpec, StatsStore


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    path.write_text("The old harbour is near the train, and you and I walked.\n" * 20)
    return path


@pytest.fixture(scope="module")
def model() -> EditableModel:
    return runs.model()


@pytest.fixture
def store(tmp_path: Path) -> StatsStore:
    return StatsStore(tmp_path / "stats")


def config(model: EditableModel, corpus: Path, method: str, **changes: object) -> EditConfig:
    asked = {"layers": runs.LAYERS, "corpus": str(corpus), "corpus_tokens": 200, **changes}
    return resolve(EditConfig.create(method=method, **asked), model)


@pytest.mark.parametrize(
    ("method", "kinds"),
    [("alphaedit", ["keys"]), ("nmke", ["keys", "inputs", "subjects"]), ("ultraedit", [])],
)
def test_every_kind_that_a_method_needs_is_gathered_and_no_other(method, kinds, model, corpus, store):
    settings = config(model, corpus, method)
    found = needed(model, settings, store)
    assert [one.kind for one in found] == kinds
    assert all(one.layers == one.missing == runs.LAYERS for one in found)
    gather(model, settings, store, found)
    assert lacking(needed(model, settings, store)) == []
    assert sorted(files(model, settings, store, found)) == sorted(store.root.glob("*.safetensors"))
    assert len(list(store.root.glob("*.safetensors"))) == len(kinds) * len(runs.LAYERS)


def test_only_the_kind_that_is_missing_is_gathered(model, corpus, store):
    keys = config(model, corpus, "alphaedit")
    gather(model, keys, store, needed(model, keys, store))
    written = {path: path.stat().st_mtime_ns for path in store.root.glob("*.safetensors")}
    own = config(model, corpus, "nmke")
    found = needed(model, own, store)
    assert [one.missing for one in found] == [(), runs.LAYERS, runs.LAYERS]
    assert lacking(found) == [*runs.LAYERS]
    gather(model, own, store, found)
    assert {path: path.stat().st_mtime_ns for path in written} == written


def test_the_cost_counts_every_kind_and_the_text_once(model, corpus, store):
    settings = config(model, corpus, "nmke")
    keys, inputs, _ = needed(model, settings, store)
    both = prepare_cost(model, [keys, inputs], settings, 100.0)
    alone = [prepare_cost(model, [one], settings, 100.0) for one in (keys, inputs)]
    assert both.seconds == pytest.approx(sum(one.seconds for one in alone))
    assert [one.disk_mb for one in alone] == [2 * tiny.D_MLP**2 * 4e-6, 2 * (tiny.D_MODEL + 1) ** 2 * 4e-6]
    assert both.disk_mb == pytest.approx(sum(one.disk_mb for one in alone))
    assert both.memory_mb == alone[0].memory_mb
    own_text = settings.model_copy(update={"corpus": "self"})
    keys, inputs, subjects = needed(model, own_text, store)
    assert not subjects.unwritten
    dear = [prepare_cost(model, some, own_text, 100.0).seconds for some in ([keys], [keys, inputs])]
    assert dear[0] > alone[0].seconds and dear[1] - dear[0] == pytest.approx(alone[1].seconds)
    store.corpus(model, CorpusSpec.of(own_text))
    kept = needed(model, own_text, store)[:2]
    assert prepare_cost(model, kept, own_text, 100.0).seconds == pytest.approx(both.seconds)
    assert prepare_cost(model, [], own_text, 100.0).seconds == 0.0


def test_statistics_of_an_edited_run_are_those_of_the_unedited_model(tmp_path):
    own = {"method": "nmke", "mask": "least"}
    plain = StatsStore(tmp_path / "plain")
    with runs.open_run(tmp_path / "unedited", store=plain, **own) as session:
        prepare_session(session)
        found = plain.prepare(session.model, [1], CorpusSpec.of(session.config), kind="inputs")[1]
    late = StatsStore(tmp_path / "late")
    with runs.open_run(tmp_path / "edited", store=late) as session:
        session.edit_batch(runs.facts(2))
        with session.using(**own):
            assert [one.missing for one in prepare_session(session)] == [(), runs.LAYERS, runs.LAYERS]
            again = late.prepare(session.model, [1], CorpusSpec.of(session.config), kind="inputs")[1]
    assert again.total.equal(found.total) and again.count == found.count


def test_a_model_that_hides_what_its_neurons_read_needs_key_statistics_only(corpus, store):
    fused = EditableModel.wrap(tiny_family("phi3"), tiny.tiny_tokenizer(64 + 256))
    settings = config(fused, corpus, "nmke", layers=(0,))
    assert settings.method == "nmke-linear"
    assert [(one.kind, one.missing) for one in needed(fused, settings, store)] == [("keys", (0,))]
    with pytest.raises(LayoutError, match="use a method that writes down-projections only"):
        needed(fused, replace_config(settings, method="nmke"), store)
