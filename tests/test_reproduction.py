"""A run is edited again from its record alone: to the same bits here, to the same scores elsewhere, or it says so."""

import json
import shutil
import sqlite3
from pathlib import Path

import pytest
import torch
from tests import runs

from nmke import reproduction
from nmke.environment import deterministic, environment
from nmke.errors import LedgerError, RequestError, VerifyError
from nmke.events import chain_hash, event_name
from nmke.provenance import FILE, without_home
from nmke.reproduction import Reproduction, compare_environments, reproduce
from nmke.stats.store import StatsStore
from nmke.types import EditRequest

FACTS = runs.facts(6)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> StatsStore:
    return StatsStore(tmp_path_factory.mktemp("stats"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, store: StatsStore) -> Path:
    """A run with everything in it: an undo, a revert, a superseded fact, a batch with other settings."""
    root = tmp_path_factory.mktemp("finished") / "run"
    with runs.open_run(root, store=store, mask="random", method="memit") as session:
        runs.edit_all(session, FACTS[:4])
        session.undo()
        runs.edit_all(session, FACTS[4:])
        session.revert("e001")
        with session.using(method="alphaedit", mask="none", steps=3):
            session.edit_batch([EditRequest(FACTS[0].prompt, FACTS[0].subject, "in", id="again")])
    return root


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory, store: StatsStore) -> Path:
    """A run whose facts mostly hold."""
    root = tmp_path_factory.mktemp("many") / "run"
    with runs.open_run(root, store=store, **runs.TAKES) as session:
        runs.edit_all(session, runs.facts(8))
    return root


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy to be tampered with."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def again(root: Path, output: Path, store: StatsStore) -> Reproduction:
    return reproduce(root, output, model=runs.model(), store=store)


def test_a_run_with_undone_and_reverted_batches_is_reproduced_bit_for_bit(finished, tmp_path, store):
    found = again(finished, tmp_path / "again", store)
    assert found.reproduced and found.comparison == "hash" and found.same_machine
    assert found.batches == 3 and found.first_difference is None and not found.differences
    assert found.content_hash[0] == found.content_hash[1]
    with runs.open_run(tmp_path / "again", store=store) as session:
        assert [event.kind for event in session.log()] == ["edit"] * 3, (
            "what was taken back is not edited again"
        )
        assert session.content_hash == found.content_hash[0]
        session.verify()
    with runs.open_run(finished, store=store) as session:
        session.verify()


def test_statistics_are_gathered_anew_where_the_cache_lacks_them(finished, tmp_path):
    assert again(finished, tmp_path / "again", StatsStore(tmp_path / "empty")).reproduced


# ---------------------------------------------------------------- tampering


def change(run: Path, column: str, value: str, *, rechain: bool) -> None:
    """Change the newest event in the ledger; with all hashes made to fit again, if asked."""
    database = sqlite3.connect(run / "ledger.sqlite")
    for trigger in ("events_fixed", "edits_fixed"):
        database.execute(f"DROP TRIGGER {trigger}")
    table = "edits" if column == "request" else "events"
    database.execute(f"UPDATE {table} SET {column} = ? WHERE seq = (SELECT max(seq) FROM events)", (value,))
    if rechain:
        seq, _, *values, _ = database.execute("SELECT * FROM events ORDER BY seq DESC").fetchone()
        edits = database.execute("SELECT * FROM edits WHERE seq = ? ORDER BY position", (seq,)).fetchall()
        chain = chain_hash(seq, tuple(values), edits)
        database.execute("UPDATE events SET chain = ?, id = ? WHERE seq = ?", (chain, event_name(chain), seq))
        content = json.loads((run / FILE).read_text())
        (run / FILE).write_text(json.dumps({**content, "ledger_chain": chain}))
    database.commit()
    database.close()


def test_a_changed_fact_is_found_in_the_chain(run, tmp_path, store):
    change(run, "hash_after", "0" * 64, rechain=False)
    with pytest.raises(VerifyError, match="was changed after it was written"):
        again(run, tmp_path / "again", store)
    assert not (tmp_path / "again").exists()


def test_a_changed_fact_with_every_hash_made_to_fit_is_not_reproduced(run, tmp_path, store):
    request = json.dumps(
        {
            "id": "again", "prompt": FACTS[0].prompt, "subject": FACTS[0].subject, "target_new": "the",
            "target_true": None, "relation": None, "paraphrases": [], "neighborhood": [],
        }
    )  # fmt: skip
    change(run, "request", request, rechain=True)
    found = again(run, tmp_path / "again", store)
    assert not found.reproduced and found.comparison == "hash" and found.same_machine
    assert found.first_difference is not None and found.content_hash[0] != found.content_hash[1]


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("nmke.json", "nmke.json was changed"),
        (FILE, "differ in content_hash"),
        ("edits", "is missing or changed"),
    ],
)
def test_changed_files_are_found_before_anything_is_edited(file, said, run, tmp_path, store):
    path = run / file
    if path.is_dir():
        path = sorted(path.iterdir())[0]
        path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    else:
        content = json.loads(path.read_text())
        path.write_text(json.dumps({**content, "created": "x", "content_hash": "0"}))
    with pytest.raises(VerifyError, match=said):
        again(run, tmp_path / "again", store)
    assert not (tmp_path / "again").exists()


def test_damaged_and_missing_summaries(run, tmp_path, store):
    (run / FILE).write_text("[")
    with pytest.raises(VerifyError, match=r"reproduce.json' is damaged"):
        again(run, tmp_path / "again", store)
    (run / FILE).unlink()
    assert again(run, tmp_path / "again", store).reproduced, "a run of an older version has none"


def test_other_weights_an_empty_run_and_an_occupied_output_are_refused(finished, tmp_path, store):
    with pytest.raises(LedgerError, match="give the original base model"):
        reproduce(finished, tmp_path / "again", model=runs.model(torch.bfloat16), store=store)
    with runs.open_run(tmp_path / "empty", store=store):
        pass
    with pytest.raises(RequestError, match="holds no batch"):
        again(tmp_path / "empty", tmp_path / "again", store)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter").write_text("dear")
    with pytest.raises(LedgerError, match="exists and is not empty"):
        again(finished, tmp_path / "mine", store)


# ---------------------------------------------------------------- another machine


def elsewhere(monkeypatch: pytest.MonkeyPatch, nudge: float) -> None:
    """This machine under another name, which rounds targets differently."""
    monkeypatch.setattr(
        reproduction,
        "environment",
        lambda device: {**environment(device), "processor": "another", "threads": 64},
    )
    from nmke.models.weights import DownProjection

    plain = DownProjection.add
    monkeypatch.setattr(
        DownProjection, "add", lambda self, left, right: plain(self, left * (1 + nudge), right)
    )


def test_on_another_machine_scores_are_compared(many, tmp_path, store, monkeypatch):
    elsewhere(monkeypatch, 1e-6)
    found = again(many, tmp_path / "again", store)
    assert found.comparison == "scores" and not found.same_machine and found.reproduced
    assert found.differences["threads"][1] == 64 and "processor" in found.differences
    assert found.content_hash[0] != found.content_hash[1] and found.first_difference is not None
    with runs.open_run(many, store=store) as session:
        count = len(session.active_requests())
    assert found.bound == pytest.approx(max(0.05, 1 / count))
    assert found.scores["reliability"][0] > found.bound, "enough holds for a loss to show"


def test_scores_far_apart_are_no_reproduction(many, tmp_path, store, monkeypatch):
    elsewhere(monkeypatch, -1.0)  # nothing is written
    found = again(many, tmp_path / "again", store)
    assert found.comparison == "scores" and not found.reproduced


def test_equal_hashes_settle_it_on_any_machine(finished, tmp_path, store, monkeypatch):
    elsewhere(monkeypatch, 0.0)
    found = again(finished, tmp_path / "again", store)
    assert found.comparison == "hash" and found.reproduced and not found.same_machine


def test_environments_are_compared_by_name():
    here = {"packages": {"torch": "2"}, "threads": 2}
    assert compare_environments(here, here) == {}
    assert compare_environments({"packages": {"torch": "1"}, "threads": 2}, here) == {"torch": ("1", "2")}
    assert compare_environments({}, here) == {"threads": (None, 2), "torch": (None, "2")}


# ---------------------------------------------------------------- the summary


def test_the_summary_follows_the_record_and_names_no_home(tmp_path, store, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home" / "zoe"))
    model = runs.model()
    model.source = str(tmp_path / "home" / "zoe" / "models" / "m")
    root = tmp_path / "run"
    with runs.open_run(root, model, store=store) as session:
        begun = json.loads((root / FILE).read_text())
        assert begun["batches"] == 0 and begun["content_hash"] == ""
        runs.edit_all(session, FACTS[:4])
        full = json.loads((root / FILE).read_text())
        session.undo()
        fewer = json.loads((root / FILE).read_text())
    assert full["batches"] == 2 and fewer["batches"] == 1 and fewer["events"] == 3
    assert full["facts_sha256"] != fewer["facts_sha256"]
    assert full["model"]["source"] == "~/models/m" and "zoe" not in json.dumps(full)
    assert full["statistics_sha256"].keys() == {"1", "2"} and full["seed"] == 0
    assert full["environment"]["packages"]["torch"] == torch.__version__
    assert full["environment"]["threads"] == torch.get_num_threads()
    with runs.open_run(tmp_path / "same", store=store) as session:
        session.edit_batch(FACTS[:2])
    assert json.loads((tmp_path / "same" / FILE).read_text())["facts_sha256"] == fewer["facts_sha256"]


def test_only_paths_under_the_home_folder_are_shortened(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    for value in ("smollm2-135m", "/home/adam/x", "/data/m", 5, None):
        assert without_home(value) == value
    assert without_home("/home/ada") == "~" and without_home("/home/ada/x") == "~/x"


def test_algorithms_are_deterministic_inside_only():
    assert not torch.are_deterministic_algorithms_enabled()
    with deterministic(torch.device("cpu")):
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.utils.deterministic.fill_uninitialized_memory
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory
    with deterministic(torch.device("cuda")):
        assert not torch.are_deterministic_algorithms_enabled(), "costs speed there: asked for only"
