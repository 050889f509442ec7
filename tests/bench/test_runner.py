"""Cells on a tiny model: what is measured, killed and resumed, collapsed, failed."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests import runs
from tests.tiers import sampled

from nmke.bench import cell_run
from nmke.bench.plan import Plan
from nmke.bench.record import CellRecord
from nmke.bench.runner import Bench
from nmke.errors import ConfigError, LedgerError, NumericsError
from nmke.evaluation import tasks
from nmke.evaluation.ability import AbilityScores
from nmke.evaluation.metrics import mean_interval
from nmke.evaluation.target_scores import predictions
from nmke.models.load import EditableModel
from nmke.session import EditSession
from nmke.stats.store import StatsStore

SETTINGS = {k: v for k, v in runs.QUICK.items() if k not in ("batch_size", "health_every")}
TIMES = ("created", "updated", "cost", "machine")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, cache: Path, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("NMKE_CACHE", str(cache))
    monkeypatch.delenv("NMKE_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    yield


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("facts") / "facts.jsonl"
    rows = [
        {
            "id": request.id,
            "prompt": request.prompt,
            "subject": request.subject,
            "target_new": request.target_new,
            "target_true": "was",
            "paraphrases": [f"The old harbour of {request.subject}"],
            "neighborhood": [{"prompt": "The capital of Italy", "answer": "is"}],
        }
        for request in runs.facts(6)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def plan(facts: Path, **changes: Any) -> Plan:
    given = {
        "model": "tiny",
        "methods": ("alphaedit",),
        "data": (str(facts),),
        "batch_sizes": (2,),
        "checkpoints": (3,),
        "held_out_tokens": 40,
        "settings": SETTINGS | {"on_collapse": "continue"},
    }
    return Plan.create(**given | changes)


def bench(folder: Path, facts: Path, **changes: Any) -> Bench:
    return Bench(folder, plan(facts, **changes), runs.model())


def only(made: Bench, **how: Any) -> CellRecord:
    (record,) = made.run(**how)
    return record


def numbers(record: CellRecord) -> dict[str, Any]:
    """Everything in a record but times, and memory with them."""
    content = record.model_dump()
    for part in (content, *content["checkpoints"]):
        for name in TIMES:
            part.pop(name, None)
    return content


def test_a_mark_is_met_at_the_end_of_its_batch_and_the_end_is_always_measured(
    tmp_path: Path, facts: Path
) -> None:
    record = only(bench(tmp_path, facts))
    assert record.status == "done"
    assert [point.n_edits for point in record.checkpoints] == [4, 6]
    assert record.identity.settings["l2"] == 10.0
    assert record.identity.settings["layers"] == list(runs.LAYERS)
    last = record.checkpoints[-1]
    assert last.n_written + last.n_known + last.n_failed == 6
    assert set(last.drift) == set(runs.LAYERS)
    assert min(last.drift.values()) > 0
    assert last.cost.seconds_per_edit is not None and last.cost.seconds_per_edit > 0
    assert last.cost.cpu_seconds_per_edit is not None and last.cost.peak_memory_mb > 10
    assert CellRecord.load(tmp_path / "cells" / f"{record.identity.id}.json") == record


def contradicting() -> Iterator[dict[str, str]]:
    """Three facts, and three that ask the same with other answers: what is said first is lost."""
    for answer, subject in (("the", "{}"), ("of", "for {}")):
        for name in runs.SUBJECTS[:3]:
            slot = subject.format(name)
            prompt = f"The train had left for {name}".replace(slot, "{}")
            yield {"id": f"{name} {answer}", "prompt": prompt, "subject": slot, "target_new": answer}


def test_both_times_agree_with_a_literal_run(tmp_path: Path) -> None:
    file = tmp_path / "facts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in contradicting()))
    settings = SETTINGS | runs.TAKES | {"on_collapse": "continue"}
    made = bench(tmp_path / "bench", file, settings=settings, order="file", complete=False)
    record = only(made)
    stream = made._stream(made.plan.cells()[0])
    config = made.plan.cells()[0].config
    right_after: dict[str, float] = {}
    at_the_end: dict[str, float] = {}
    with EditSession.open(runs.model(), tmp_path / "run", config=config, store=StatsStore()) as session:
        for start in (0, 2, 4):
            batch = stream.requests[start : start + 2]
            session.edit_batch(batch)
            for request in batch:
                pair = (request.text, request.target_new)
                right_after[request.id] = predictions(session.model, [pair])[0].accuracy
        for request in stream.requests:
            pair = (request.text, request.target_new)
            at_the_end[request.id] = predictions(session.model, [pair])[0].accuracy
        content_hash = session.content_hash
    last = record.checkpoints[-1]
    assert last.content_hash == content_hash
    for time, literal in (("after_batch", right_after), ("after_last", at_the_end)):
        score = last.scores(time)["teacher_forced"].metrics["reliability"]  # type: ignore[arg-type]
        assert score is not None
        assert dict(zip(record.identity.stream.ids, score.per_fact or (), strict=True)) == literal
        assert score.value == pytest.approx(sum(literal.values()) / 6)
    assert right_after != at_the_end  # else the two times could be mixed up unseen


def test_the_unedited_model_keeps_everything_and_learns_nothing(tmp_path: Path, facts: Path) -> None:
    record = only(bench(tmp_path, facts, methods=("unedited",)))
    last = record.checkpoints[-1]
    scores = last.after_last["teacher_forced"].metrics
    assert scores["reliability"] is not None and scores["reliability"].value == 0.0
    assert scores["locality"] is not None and scores["locality"].value == 1.0
    assert (last.held_out.perplexity, last.held_out.kl) == (last.held_out.perplexity_base, 0.0)
    assert (last.cost.seconds_per_edit, last.neurons_kept, last.drift) == (None, None, {})
    assert (
        last.content_hash
        == only(bench(tmp_path / "b", facts, methods=("unedited",))).checkpoints[0].content_hash
    )


def test_tasks_are_asked_at_every_checkpoint_of_edited_and_unedited_model(
    tmp_path: Path, facts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ability(model: EditableModel, name: str, *, limit: int | None, seed: int) -> AbilityScores:
        """A task whose score tells which weights it was asked of."""
        values = (float(float(model.layout.layers[2].down_proj.weight.abs().sum()) % 1),) * (limit or 0)
        return AbilityScores(
            name, "", "fake/1", {"acc": mean_interval(values)}, {"acc": values}, len(values), ""
        )

    monkeypatch.setattr(tasks, "measure", ability)
    monkeypatch.setattr(tasks, "_facts", lambda name: iter([name]))
    record = only(bench(tmp_path, facts, tasks=("mmlu",), task_limit=5))
    first, last = (point.tasks["mmlu"] for point in record.checkpoints)
    assert (last.metric, last.n, last.version) == ("acc", 5, "fake/1")
    assert len({first.value, last.value, last.base}) == 3
    assert first.base == last.base
    assert last.base is not None and last.change is not None
    assert last.change[0] == pytest.approx(last.value - last.base)


def test_one_cell_leaves_nothing_behind_for_the_next(tmp_path: Path, facts: Path) -> None:
    together = list(
        bench(tmp_path / "a", facts, methods=("memit", "nmke-linear[mask=random]", "unedited")).run()
    )
    alone = only(bench(tmp_path / "b", facts, methods=("nmke-linear[mask=random]",)))
    assert numbers(together[1]) == numbers(alone)
    kept = alone.checkpoints[-1].neurons_kept
    assert kept is not None and 0.05 < kept < 0.6
    assert together[0].checkpoints[-1].neurons_kept is None
    assert together[2].checkpoints[-1].held_out.kl == 0.0


def test_cells_on_the_same_facts_share_the_targets_of_their_first_batch(tmp_path: Path, facts: Path) -> None:
    methods = ("alphaedit", "memit", "alphaedit[l2=1]", "alphaedit[lr=1]")
    made = bench(tmp_path / "a", facts, methods=methods)
    together = list(made.run())
    assert made._known.reused == 2  # not of the later batches, nor with another learning rate
    for method, record in zip(methods, together, strict=True):
        assert numbers(record) == numbers(only(bench(tmp_path / method, facts, methods=(method,))))
    sought, shared = (record.checkpoints[-1].cost for record in together[:2])
    assert shared.stages["targets"] > 0.3 * sought.stages["targets"]  # counted as when they were sought
    assert shared.cpu_seconds_per_edit is not None  # of the batches it sought targets for itself


@pytest.mark.parametrize("steps", sampled(range(1, 5), {1, 4}.__contains__))
def test_a_cell_stopped_anywhere_goes_on_to_the_same_numbers(
    tmp_path: Path, facts: Path, steps: int, whole: CellRecord
) -> None:
    left = iter(range(steps + 1))
    first = only(bench(tmp_path, facts), stop=lambda: next(left, None) is None)
    assert first.status == "running"
    assert numbers(only(bench(tmp_path, facts))) == numbers(whole)


@pytest.mark.parametrize("kill", sampled(range(3), {0, 2}.__contains__))
def test_a_cell_killed_between_a_batch_and_its_notes_goes_on_to_the_same_numbers(
    tmp_path: Path, facts: Path, kill: int, whole: CellRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = cell_run.CellRun._write

    def killed(run: cell_run.CellRun, number: int, notes: Any) -> None:
        if number == kill:
            raise KeyboardInterrupt
        write(run, number, notes)

    monkeypatch.setattr(cell_run.CellRun, "_write", killed)
    with pytest.raises(KeyboardInterrupt):
        only(bench(tmp_path, facts))
    monkeypatch.setattr(cell_run.CellRun, "_write", write)
    resumed = only(bench(tmp_path, facts))
    assert numbers(resumed) == numbers(whole)
    assert (resumed.checkpoints[-1].cost.cpu_seconds_per_edit or 0) > 0


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, facts: Path, cache: Path) -> CellRecord:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NMKE_CACHE", str(cache))
        return only(bench(tmp_path_factory.mktemp("whole"), facts))


def test_the_run_behind_a_finished_cell_is_deleted_unless_it_is_to_be_kept(
    tmp_path: Path, facts: Path
) -> None:
    (kept,) = bench(tmp_path, facts).run(keep=True)
    folder = tmp_path / "work" / kept.identity.id / "run"
    with EditSession.open(runs.model(), folder, store=StatsStore()) as session:
        assert session.content_hash == kept.checkpoints[-1].content_hash
    (other,) = bench(tmp_path, facts, methods=("memit",)).run()
    assert not (tmp_path / "work" / other.identity.id).exists()


def test_what_is_finished_is_not_run_again(tmp_path: Path, facts: Path) -> None:
    list(bench(tmp_path, facts).run())
    assert list(bench(tmp_path, facts).run()) == []
    more = list(bench(tmp_path, facts, methods=("alphaedit", "unedited")).run())
    assert [record.identity.label for record in more] == ["unedited"]


def test_a_crossed_limit_ends_the_cell_as_collapsed(tmp_path: Path, facts: Path) -> None:
    settings = SETTINGS | {"kl_stop": 1e-6, "kl_warn": 1e-7}
    record = only(bench(tmp_path, facts, settings=settings))
    assert record.status == "collapsed"
    assert "KL to the unedited model" in (record.reason or "")
    assert [point.n_edits for point in record.checkpoints] == [4]


def test_a_limit_crossed_inside_a_batch_is_measured_at_once(tmp_path: Path, facts: Path) -> None:
    settings = SETTINGS | {"kl_stop": 1e-6, "kl_warn": 1e-7, "health_every": 1}
    record = only(bench(tmp_path, facts, settings=settings))
    assert record.status == "collapsed"
    assert [point.n_edits for point in record.checkpoints] == [2]


def test_an_error_fails_its_cell_alone_and_retry_runs_it_again(
    tmp_path: Path, facts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit = EditSession.edit_batch

    def broken(session: EditSession, *given: Any, **more: Any) -> Any:
        if session.config.method == "memit" and session.ledger.edits.count() == 1:
            raise NumericsError("edits e1: the update is not finite; raise `l2`")
        return edit(session, *given, **more)

    monkeypatch.setattr(EditSession, "edit_batch", broken)
    methods = ("memit", "alphaedit")
    failed, other = bench(tmp_path, facts, methods=methods).run()
    assert (failed.status, failed.reason) == ("failed", "edits e1: the update is not finite; raise `l2`")
    assert other.status == "done"
    assert list(bench(tmp_path, facts, methods=methods).run()) == []
    monkeypatch.setattr(EditSession, "edit_batch", edit)
    again = only(bench(tmp_path, facts, methods=methods), retry=True)
    assert (again.status, again.reason, len(again.checkpoints)) == ("done", None, 2)


def test_settings_that_do_not_go_with_the_model_are_refused_before_anything_is_run(
    tmp_path: Path, facts: Path
) -> None:
    made = bench(tmp_path, facts, methods=("alphaedit", "alphaedit[layers=9]"))
    with pytest.raises(ConfigError, match=r"alphaedit\[layers=9\]: layers \[9\] asked"):
        list(made.run())
    assert not list(tmp_path.glob("cells/*"))


def test_a_record_of_other_weights_is_not_continued(tmp_path: Path, facts: Path) -> None:
    only(bench(tmp_path, facts), stop=iter([False, False, True]).__next__)
    other = Bench(tmp_path, plan(facts), runs.model(d_mlp=48))
    with pytest.raises(LedgerError, match="is of another model or of other facts"):
        list(other.run())


def test_a_run_folder_without_its_notes_is_refused(tmp_path: Path, facts: Path) -> None:
    only(bench(tmp_path, facts), stop=iter([False] * 4 + [True]).__next__)
    for path in tmp_path.glob("work/*/notes/*.json"):
        path.unlink()
    with pytest.raises(LedgerError, match="holds 2 batches and notes of 0"):
        list(bench(tmp_path, facts).run())
