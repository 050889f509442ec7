"""Inputs that are wrong on purpose, through the whole session: text in other scripts, odd models, links, long answers.

What single readers do with poisoned files is in `tests/fuzz`; pickled, damaged, non-finite and quantised weights in
`tests/models/test_load.py`; deltas for other weights in `tests/export/test_delta.py`.
"""

import io
import zipfile
from pathlib import Path

import pytest
import torch
from tests import runs, tiny
from transformers import PreTrainedModel

from nmke.errors import LedgerError, NmkeError, RequestError
from nmke.evaluation.data_sets import DataFile
from nmke.evaluation.download import fetch
from nmke.models.load import EditableModel
from nmke.run_folder import RunFolder
from nmke.run_start import delete_run
from nmke.session import EditSession
from nmke.stats.store import StatsStore
from nmke.types import EditRequest


@pytest.fixture(scope="module")
def store() -> StatsStore:
    return runs.shared_store()


def edit_and_undo(model: EditableModel, root: Path, store: StatsStore, *requests: EditRequest) -> list[str]:
    """Edit them in one run and take everything back, bit for bit; their outcomes."""
    before = runs.bits(model)
    with runs.open_run(root, model, store=store) as session:
        statuses = [record.status for report in runs.edit_all(session, requests) for record in report.records]
        if "written" in statuses or "failed" in statuses:
            assert runs.bits(model) != before
        session.undo(len(session.ledger.active()))
        assert runs.bits(model) == before
        session.verify()
    return statuses


# ---------------------------------------------------------------- text


@pytest.mark.parametrize(
    ("prompt", "subject", "target"),
    [
        ("עיר הבירה של {} היא", "צרפת", "ليون"),
        ("\u202eThe capital of {}\u202c is", "\u200fFrance\u200f", "\u202bLyon\u202c"),
        ("La capitale de {} est", "Co\u0302te d'Ivoire", "Yamoussoukro\u0301\u0323"),
        ("{}の首都は", "日本", "東京"),
        ("The flag of {} is", "🏳️‍🌈👩‍👩‍👧", "🇫🇷"),
        ("\u0301 of {} is", "\u0301", "a\u0301"),
    ],
)
def test_any_script_is_edited_and_undone(prompt, subject, target, tmp_path, store):
    request = EditRequest(prompt, subject, target, paraphrases=(f"{subject} –",))
    (status,) = edit_and_undo(runs.model(), tmp_path / "run", store, request)
    assert status in ("written", "failed")
    with EditSession.open(runs.model(), tmp_path / "run", store=store) as session:
        (event, _) = session.log()
        assert event.edits[0].request == request, "the record keeps every character"


def test_a_subject_of_nothing_visible_is_an_error_and_writes_nothing(tmp_path, store):
    with runs.open_run(tmp_path / "run", store=store) as session:
        for subject in ("\u200b", "\u00ad", "\ufeff"):
            try:
                session.edit_batch([EditRequest("The capital of {} is", subject, "Lyon")])
            except RequestError as error:
                assert "subject" in str(error)
        assert session.verify()["events"] == len(session.log())


def test_an_answer_of_three_hundred_tokens_fits_or_is_refused(tmp_path, store):
    answer = "the of is in " * 75
    with (
        runs.open_run(tmp_path / "short", store=store) as session,
        pytest.raises(RequestError, match=r"have 3\d\d tokens, the model reads 256; shorten"),
    ):
        session.edit("The capital of {France} is", answer)
    tokenizer = tiny.tiny_tokenizer()
    long = runs.loud_llama(vocab_size=len(tokenizer), max_position_embeddings=1024)
    request = EditRequest("The capital of {} is", "France", answer)
    model = EditableModel.wrap(long, tokenizer)
    assert edit_and_undo(model, tmp_path / "long", store, request) in (["written"], ["failed"])


# ---------------------------------------------------------------- models


def test_a_vocabulary_of_one_token_says_everything_already_or_is_refused(tmp_path, store):

    class One:
        """Knows one token for every letter."""

        pad_token_id = eos_token_id = 0
        is_fast = True

        def __call__(self, text, return_offsets_mapping=False, **_):
            spans = [(i, i + 1) for i in range(len(text))]
            return {
                "input_ids": [0] * len(text),
                **({"offset_mapping": spans} if return_offsets_mapping else {}),
            }

        def decode(self, ids, **_):
            return "a" * len(ids)

        def batch_decode(self, rows, **_):
            return [self.decode(row) for row in rows]

    model = runs.loud_llama(vocab_size=1, pad_token_id=0, bos_token_id=None, eos_token_id=0)
    try:
        found = edit_and_undo(EditableModel.wrap(model, One()), tmp_path / "run", store, runs.facts(1)[0])
    except NmkeError as error:
        assert "; " in str(error)
    else:
        assert found == ["known"]


def loud(model: PreTrainedModel) -> EditableModel:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8.0)
    return EditableModel.wrap(model, tiny.tiny_tokenizer())


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_that_is_tied_or_not_stays_as_it_is(tied, tmp_path, store):
    size = len(tiny.tiny_tokenizer())
    model = loud(tiny.tiny_llama(vocab_size=size, num_hidden_layers=4, tie_word_embeddings=tied))
    head, embedding = model.model.get_output_embeddings().weight, model.model.get_input_embeddings().weight
    assert (head.data_ptr() == embedding.data_ptr()) is tied
    before = head.clone()
    with runs.open_run(tmp_path / "run", model, store=store) as session:
        runs.edit_all(session, runs.facts(2))
        assert {changed.layer for changed in session.changed()} <= set(runs.LAYERS) and session.changed()
        assert torch.equal(head, before)
        assert (head.data_ptr() == embedding.data_ptr()) is tied


def test_dropout_that_was_left_on_changes_nothing(tmp_path, store):
    size = len(tiny.tiny_tokenizer())
    hashes = []
    for training in (False, True):
        rates = {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5}
        model = loud(tiny.tiny_gpt2(vocab_size=size, n_layer=4, **rates))
        with runs.open_run(tmp_path / f"run{training}", model, store=store) as session:
            model.model.train(training)
            runs.edit_all(session, runs.facts(2))
            hashes.append(session.content_hash)
    assert hashes[0] == hashes[1]


def test_a_model_with_weights_that_are_nowhere_is_refused():
    tokenizer = tiny.tiny_tokenizer()
    whole = runs.loud_llama(vocab_size=len(tokenizer))
    whole.model.layers[1].mlp.down_proj.to_empty(device="meta")
    with pytest.raises(NmkeError, match="; "):
        EditableModel.wrap(whole, tokenizer)


# ---------------------------------------------------------------- places


@pytest.mark.parametrize("name", ["edits", "head", "lock", "ledger.sqlite", "scores", "deep/inside"])
def test_a_link_out_of_the_run_folder_is_refused_and_its_end_left_alone(name, tmp_path):
    with runs.open_run(tmp_path / "run") as session:
        runs.edit_all(session, runs.facts(2))
    outside = tmp_path / "mine"
    outside.mkdir()
    (outside / "000009.safetensors").write_text("mine")
    place = tmp_path / "run" / name
    if place.is_dir():
        place.rename(tmp_path / "away")
    place.unlink() if place.is_file() else place.parent.mkdir(exist_ok=True)
    place.symlink_to(outside if name in ("edits", "head", "scores") else outside / "000009.safetensors")
    with pytest.raises(LedgerError, match=r"is a link that leads out of the run folder.*remove the link"):
        runs.open_run(tmp_path / "run")
    assert (outside / "000009.safetensors").read_text() == "mine" and len(list(outside.iterdir())) == 1


def test_a_link_inside_the_folder_and_a_linked_folder_are_fine(tmp_path):
    with runs.open_run(tmp_path / "run") as session:
        runs.edit_all(session, runs.facts(2))
    (tmp_path / "run" / "newest").symlink_to(tmp_path / "run" / "edits")
    (tmp_path / "elsewhere").symlink_to(tmp_path / "run")
    with runs.open_run(tmp_path / "elsewhere") as session:
        session.verify()


def test_links_do_not_count_as_leftovers_and_deleting_does_not_follow_them(tmp_path):
    outside = tmp_path / "mine"
    outside.mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "edits").symlink_to(outside)
    with pytest.raises(LedgerError, match="exists and is not empty"):
        runs.open_run(tmp_path / "run")
    with runs.open_run(tmp_path / "other"):
        pass
    (tmp_path / "other" / "more").symlink_to(outside)
    (outside / "letter").write_text("dear")
    delete_run(tmp_path / "other")
    assert (outside / "letter").read_text() == "dear" and not (tmp_path / "other").exists()


def test_ids_never_become_paths(tmp_path, store):
    request = EditRequest("The train had left for {}", "France", "the", id="../../../escaped")
    (tmp_path / "deep" / "er").mkdir(parents=True)
    with runs.open_run(tmp_path / "deep" / "er" / "run", store=store) as session:
        session.edit_batch([request])
        session.verify()
    assert {path.name for path in tmp_path.iterdir()} == {"deep"}
    assert not [path for path in tmp_path.rglob("*escaped*")]


def test_an_archive_gives_the_named_member_and_nothing_else(tmp_path, monkeypatch):
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("../../evil.txt", "evil")
        archive.writestr("/absolute.txt", "evil")
        archive.writestr("data/test.jsonl", '{"a": 1}\n')
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "set.jsonl.part").write_bytes(packed.getvalue())
    monkeypatch.setattr("nmke.evaluation.download._download", lambda url, part, progress: "0" * 64)
    file = DataFile("http://127.0.0.1/x.zip", "set.jsonl", member="data/test.jsonl")
    assert fetch(file, folder).path.read_text() == '{"a": 1}\n'
    assert {path.name for path in tmp_path.rglob("*")} == {"data", "set.jsonl", "downloads.json"}
    assert not Path("/absolute.txt").exists()


def test_the_recipe_of_a_stranger_cannot_make_objects(tmp_path):
    (tmp_path / "nmke.json").write_text("{}")
    (tmp_path / "recipe.yaml").write_text(f"method: !!python/object/apply:os.mkdir ['{tmp_path / 'made'}']\n")
    with pytest.raises(NmkeError, match="cannot be read"):
        _ = RunFolder(tmp_path).recipe
    assert not (tmp_path / "made").exists()
