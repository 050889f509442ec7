"""A run that was stopped and opened again ends as one that was not: same hashes, same solver state, bit for bit."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests import runs
from tests.tiers import sampled

from nmke.config import EditConfig
from nmke.editors.memory import KeyMemory, SolverState
from nmke.errors import ConfigError, NumericsError, RequestError
from nmke.run_folder import RunFolder
from nmke.run_memory import RunMemory
from nmke.session import EditSession
from nmke.stats.store import StatsStore
from nmke.types import EditRequest

D_MLP = 5  # fewer than edits, so that the key memory collapses into a second moment
FACTS = runs.facts(7)
AGAIN = [  # the first fact with another answer, the second as it is, the third twice
    replace(FACTS[0], id="other", target_new="is"),
    replace(FACTS[1], id="same"),
    replace(FACTS[2], id="third", target_new="in"),
    replace(FACTS[2], id="fourth", target_new="the"),
]
Step = Callable[[EditSession], object]


@pytest.fixture(scope="module")
def store() -> StatsStore:
    return runs.shared_store()


@pytest.fixture
def opened(tmp_path: Path, store: StatsStore) -> Iterator[Callable[..., EditSession]]:
    """Opens sessions on fresh models, one run folder per name."""
    sessions = []

    def begin(name: str = "run", d_mlp: int = D_MLP, **changes: object) -> EditSession:
        settings = {"l2": 0.5, **changes}
        sessions.append(runs.open_run(tmp_path / name, runs.model(d_mlp=d_mlp), store=store, **settings))
        return sessions[-1]

    yield begin
    for session in sessions:
        session.close()


def states_equal(one: SolverState, two: SolverState) -> bool:
    return memories_equal(one.memories, two.memories) and memories_equal(one.inputs, two.inputs)


def memories_equal(one: Mapping[int, KeyMemory], two: Mapping[int, KeyMemory]) -> bool:
    if one.keys() != two.keys():
        return False
    for layer, memory in one.items():
        other = two[layer]
        grams = (memory.gram, other.gram)
        if (grams[0] is None) != (grams[1] is None) or not torch.equal(memory.rows, other.rows):
            return False
        if memory.count != other.count or (grams[0] is not None and not torch.equal(*grams)):
            return False
    return True


def edit(*requests: EditRequest) -> Step:
    return lambda session: runs.edit_all(session, requests)


SCRIPT: tuple[Step, ...] = (
    edit(*FACTS[:6]),
    edit(*AGAIN[:2]),
    lambda session: session.undo(2),
    lambda session: runs.edit_all(session, [*FACTS[:6], *AGAIN], resume=True),
    lambda session: session.revert("e005"),
    lambda session: runs.edit_all(session, FACTS[:7], resume=True),
)
RANDOM = {"method": "nmke-linear", "mask": "random", "mask_scope": "batch", "ratio": 0.5, "batch_size": 3}


OWN = {"method": "nmke", "d_mlp": 64, "batch_size": 3}


@pytest.mark.parametrize(
    ("settings", "steps"),
    [({}, SCRIPT), (RANDOM, SCRIPT[:4]), (OWN, SCRIPT)],
    ids=["plain", "random", "own neurons"],
)
def test_opening_again_before_every_step_changes_nothing(opened, settings, steps):
    unbroken = opened("unbroken", **settings)
    collapsed = False
    for step in steps:
        step(unbroken)
        broken = opened("broken", **settings)
        step(broken)
        assert broken.content_hash == unbroken.content_hash
        fresh = RunMemory(unbroken.folder, unbroken.ledger, torch.device("cpu")).state()
        assert states_equal(runs.live_state(unbroken), fresh)
        assert states_equal(runs.live_state(broken), fresh)
        collapsed |= any(memory.gram is not None for memory in fresh.memories.values())
        inputs = {layer: memory.count for layer, memory in fresh.inputs.items()}
        own = len(unbroken.active_requests()) if settings is OWN else None
        assert set(inputs.values()) == ({own} if own else set())
        broken.close()
    kinds = {e.status for event in unbroken.log() for e in event.edits}
    expected = {"written"} if settings is OWN else {"written", "failed"}  # with own neurons all edits take
    assert kinds >= expected and ("known" in kinds or steps is not SCRIPT)
    assert collapsed or settings is OWN
    assert any("supersedes" in e.detail for event in unbroken.log() for e in event.edits)
    opened("broken", **settings).verify()


@pytest.mark.parametrize("stops", [(1, 1, 1), (0, 4)])
def test_stopping_between_batches_and_resuming_equals_an_unbroken_run(opened, stops):
    everything = [*FACTS[:4], *AGAIN]
    unbroken = opened("unbroken")
    hashes = [report.event.hash_after for report in runs.edit_all(unbroken, everything)]
    for count in stops:
        session = opened("broken")
        reports = session.edit_many(everything, resume=True)
        for _ in range(count):
            next(reports)
        session.close()
    session = opened("broken")
    runs.edit_all(session, everything, resume=True)
    assert [event.hash_after for event in session.log()] == hashes


def test_known_facts_alone_keep_the_head_through_reopening(opened):
    session = opened(d_mlp=64)
    written = [
        r for report in runs.edit_all(session, FACTS[:4]) for r in report.records if r.status == "written"
    ]
    again = [replace(r.request, id=f"again-{r.request.id}") for r in written]
    known = session.edit_batch(again)
    assert {r.status for r in known.records} == {"known"}
    head = session.content_hash
    session.close()
    session = opened(d_mlp=64)
    assert session.content_hash == head
    session.verify()
    runs.edit_all(session, FACTS[4:6])
    session.verify()


def test_released_keys_leave_the_moment_of_those_that_are_kept(opened):
    session = opened()
    runs.edit_all(session, [*FACTS[:6], *AGAIN])
    folder, index = session.folder, session.ledger.edits
    from nmke.batch_file import read_rows

    kept: dict[int, list[torch.Tensor]] = {layer: [] for layer in runs.LAYERS}
    for place in index.holders():
        row = index.written(place.seq).index(place)
        for layer, keys in read_rows(folder.root / folder.edits_name(place.seq))[0].items():
            kept[layer].append(keys[row].double())
    for layer, memory in runs.live_state(session).memories.items():
        keys = torch.stack(kept[layer])
        assert memory.count == len(keys) < 6 + len(AGAIN)
        torch.testing.assert_close(memory.moment(), keys.T @ keys, rtol=1e-9, atol=1e-9)


def test_a_superseded_fact_is_left_out_and_comes_back_with_undo(opened):
    session = opened(batch_size=1)
    runs.edit_all(session, [FACTS[0], FACTS[1]])
    record = session.edit_batch([AGAIN[0]]).records[0]
    assert record.detail["supersedes"] == FACTS[0].id
    assert [r.id for r in session.active_requests()] == [FACTS[1].id, "other"]
    session.undo()
    assert [r.id for r in session.active_requests()] == [FACTS[0].id, FACTS[1].id]


def test_the_same_fact_twice_goes_into_two_batches(opened):
    session = opened(batch_size=4)
    reports = runs.edit_all(session, [FACTS[2], AGAIN[2], AGAIN[3], FACTS[3]])
    assert [[r.request.id for r in report.records] for report in reports] == [
        ["e002", "e003"],
        ["third"],
        ["fourth"],
    ]
    with pytest.raises(RequestError, match="'third' and 'fourth' of one batch ask for the same fact"):
        session.edit_batch(AGAIN[2:])
    with pytest.raises(RequestError, match="without facts"):
        session.edit_batch([])


def test_ids_that_are_there_already_are_refused_without_resume(opened):
    session = opened()
    runs.edit_all(session, FACTS[:2])
    with pytest.raises(RequestError, match=r"1 of 2 facts are in the run already \(first: 'e001'"):
        runs.edit_all(session, FACTS[1:3])
    with pytest.raises(RequestError, match="'e003' occurs twice"):
        runs.edit_all(session, [FACTS[3], FACTS[3]])
    assert len(session.log()) == 1


# ---------------------------------------------------------------- an interrupted revert


def interrupt(
    session: EditSession, monkeypatch: pytest.MonkeyPatch, after: int, error: type[BaseException]
) -> None:
    """Let a revert of the session break off after some replayed batches."""
    write, count = session._writer.write, 0

    def counted(*arguments: object) -> object:
        nonlocal count
        count += 1
        if count > after:
            raise error("enough")
        return write(*arguments)

    monkeypatch.setattr(session._writer, "write", counted)


FINISH: dict[str, Step] = {
    "resume": lambda session: runs.edit_all(session, FACTS[:6], resume=True),
    "edit": lambda session: session.edit_batch([FACTS[6]]),
    "undo": lambda session: session.undo(),
    "revert": lambda session: session.revert("e003"),
}


@pytest.mark.parametrize(
    ("how", "after"),
    sampled(
        [("resume", 0), ("edit", 2), ("undo", 1), ("revert", 2)], lambda one: one[0] in ("resume", "revert")
    ),
)
def test_the_next_write_finishes_an_interrupted_revert(opened, monkeypatch, after, how):
    whole, broken = opened("whole"), opened("broken")
    for session in (whole, broken):
        runs.edit_all(session, FACTS[:6])
    whole.revert("e001")
    interrupt(broken, monkeypatch, after, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        broken.revert("e001")
    broken.close()

    again = opened("broken")
    pending = again.pending_replay()
    ids = [("e000",), ("e002", "e003"), ("e004", "e005")]
    assert pending is not None and pending.reverted == "e001" and list(pending.left) == ids[after:]
    FINISH[how](whole), FINISH[how](again)
    if how == "resume":  # the reverted fact is not in the run, so that it is edited again at the end
        assert again.log()[-1].edits[0].request.id == "e001"
    assert again.pending_replay() is None and again.content_hash == whole.content_hash
    assert [r.id for r in again.active_requests()] == [r.id for r in whole.active_requests()]
    again.verify()


def test_a_replay_that_cannot_be_finished_can_be_given_up(opened, monkeypatch):
    session = opened()
    runs.edit_all(session, FACTS[:6])
    with monkeypatch.context() as patched:
        interrupt(session, patched, 1, NumericsError)
        with pytest.raises(NumericsError):
            session.revert("e000")
    assert session.pending_replay() is not None
    session.abandon_replay()
    assert session.pending_replay() is None and opened("other").pending_replay() is None
    assert [r.id for r in session.active_requests()] == ["e001"]
    assert session.log()[-1].body["abandoned"] == [["e002", "e003"], ["e004", "e005"]]
    runs.edit_all(session, FACTS[:4], resume=True)
    head = session.content_hash
    session.close()
    assert opened().content_hash == head and opened().pending_replay() is None


def test_revert_edits_each_batch_again_with_its_own_settings(opened, tmp_path, store):
    def both(name: str, first: list[EditRequest]) -> EditSession:
        session = opened(name, d_mlp=64, method="memit", steps=2)
        runs.edit_all(session, first)
        session.close()
        session = opened(name, d_mlp=64, method="nmke", steps=3)
        runs.edit_all(session, FACTS[4:6])
        return session

    reverted = both("reverted", FACTS[:3])
    reverted.close()
    reverted = opened("reverted", d_mlp=64, method="alphaedit", steps=4)
    assert reverted.revert_cost("e000")["edits"] == 4
    reverted.revert("e000")
    last = reverted.log()[-1]
    assert (last.body["config"]["method"], last.body["config"]["steps"]) == ("nmke", 3)

    never = opened("never", d_mlp=64, method="memit", steps=2)
    never.edit_batch(FACTS[1:2]), never.edit_batch(FACTS[2:3])
    never.close()
    never = opened("never", d_mlp=64, method="nmke", steps=3)
    never.edit_batch(FACTS[4:6])
    assert reverted.content_hash == never.content_hash


# ---------------------------------------------------------------- retry


def test_failed_edits_are_edited_again_with_other_settings(opened):
    session = opened(d_mlp=64, lr=0.01, clamp=0.1)
    records = [r for report in runs.edit_all(session, FACTS[:3]) for r in report.records]
    assert {r.status for r in records} == {"failed"}
    with pytest.raises(RequestError, match="fits 0 active edits"):
        session.retry(["nobody"])
    reports = session.retry(["e000", "e001"], method="memit", lr=2.0, clamp=8.0, steps=8)
    again = [r for report in reports for r in report.records]
    assert [r.status for r in again] == ["written", "written"]
    assert [r.detail["supersedes"] for r in again] == ["e000", "e001"]
    config = EditConfig.create(**reports[0].event.body["config"])
    assert (config.method, config.covariance_weight, config.l2) == ("memit", 0.1, 0.5)
    assert session.config.method == "alphaedit"
    assert sorted(r.id for r in session.active_requests()) == ["e000", "e001", "e002"]
    assert runs.live_state(session).memories[1].count == 3
    with pytest.raises(RequestError, match="'e000' is 'written'; only edits that failed"):
        session.retry(["e000"])
    hash_after = session.content_hash
    session.close()

    session = opened(d_mlp=64, lr=0.01, clamp=0.1)
    assert session.content_hash == hash_after and runs.live_state(session).memories[1].count == 3
    assert runs.edit_all(session, FACTS[:3], resume=True) == []
    session.revert("e000")
    assert sorted(r.id for r in session.active_requests()) == ["e001", "e002"], "both tries are taken back"
    session.verify()


def test_find_takes_a_unique_beginning(opened):
    session = opened()
    runs.edit_all(session, [*FACTS[:2], AGAIN[0]])
    assert session.find("oth")[1] == AGAIN[0] and session.find("e001")[1] == FACTS[1]
    with pytest.raises(RequestError, match=r"'e00' fits 2 active edits \(e000, e001\)"):
        session.find("e00")
    with pytest.raises(RequestError, match="undo of 9 batches asked, the run holds 2"):
        session.undo(9)


def test_a_run_is_not_opened_under_another_models_name(opened, tmp_path):
    session = opened("run")
    root = session.folder.root
    session.close()
    with pytest.raises(ConfigError, match="name that model"):
        EditSession.open("smollm2-135m", root)


def test_an_unknown_neuron_score_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ConfigError, match="did you mean 'lps'"):
        runs.open_run(tmp_path / "run", attribution="lbs", method="nmke")


def test_a_run_opened_without_settings_goes_on_with_its_own(tmp_path, store):
    root = tmp_path / "run"
    with runs.open_run(root, store=store, l2=0.5) as session:
        given = session.config
    assert RunFolder(root).recipe["layers"] == runs.LAYERS
    for opened in (
        EditSession.open(runs.model(), root, store=store),
        EditSession.resume(RunFolder(root), store=store, model=runs.model()),
    ):
        with opened as session:
            assert session.config == given
    with EditSession.open(
        runs.model(), root, config=EditConfig.create(method="memit"), store=store
    ) as session:
        assert session.config.method == "memit" and session.config.steps == EditConfig().steps


def test_a_recipe_written_by_hand_reads_as_the_command_line_reads_it(tmp_path):
    (tmp_path / "recipe.yaml").write_text("layers: 1-2\nsteps: 3\n")
    assert RunFolder(tmp_path).recipe == {"layers": (1, 2), "steps": 3}
    (tmp_path / "recipe.yaml").write_text("- 1\n")
    with pytest.raises(ConfigError, match=r"recipe.yaml' is not a mapping"):
        _ = RunFolder(tmp_path).recipe


def test_other_settings_hold_inside_the_with_only(opened):
    session = opened()
    before = session.config
    with session.using(steps=7) as config:
        assert config.steps == session.config.steps == 7
    assert session.config == before
    with pytest.raises(ConfigError, match="did you mean 'steps'"), session.using(stepz=7):
        pass


def test_facts_of_a_subject_that_the_model_says_are_held(tmp_path, monkeypatch):
    from nmke import writing

    real, held = writing.compute_updates, []

    def watched(method, batch):
        held.append([request.id for request in batch.held])
        return real(method, batch)

    monkeypatch.setattr(writing, "compute_updates", watched)
    facts = runs.facts(3)
    again = replace(facts[0], target_new="is", id="again")
    others = [
        EditRequest("They slept in {}", facts[0].subject, "the", id="first"),
        EditRequest("It was cold in {}", facts[0].subject, "the", id="second"),
        EditRequest("They went to {}", facts[1].subject, "of", id="elsewhere"),
    ]
    with runs.open_run(tmp_path / "run", hold_earlier=True, batch_size=2, **runs.TAKES) as session:
        status = {}

        def said(*names):
            """Those that the model came to say; what it does not say has not to be held."""
            return [name for name in names if status[name] == "written"]

        for batch in ([facts[0], facts[1]], others[:1], [again], others[1:], [facts[2]]):
            status |= {r.request.id: r.status for r in session.edit_batch(batch).records}
        assert said("e000", "e001") and said("first")
        assert [sorted(names) for names in held] == [
            [], said("e000"), said("first"), said("again", "e001", "first"), [],
        ]  # fmt: skip
        session.undo(2)
        session.edit_batch(others[1:])
        reports = session.revert("first")
        status |= {record.request.id: record.status for record in reports[0].records}
        assert [sorted(names) for names in held[5:]] == [sorted(held[3]), [], said("again", "e001")]
    held.clear()
    with runs.open_run(tmp_path / "not", batch_size=2) as session:
        runs.edit_all(session, [facts[0], others[0]])
        assert held == [[]]
