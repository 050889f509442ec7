"""Health after a batch: what is measured, which limits it crosses, and what a session does then."""

import json
import logging
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests import runs

from nmke import health
from nmke.config import EditConfig
from nmke.errors import HealthError
from nmke.evaluation.perplexity import perplexity, text_windows
from nmke.facts import bundled_facts
from nmke.health import HealthCheck, divergence, heldout_texts, judge, read
from nmke.session import EditSession
from nmke.stats.store import StatsStore
from nmke.weights_state import WeightsState

CONFIG = EditConfig.create()
ALWAYS = {"kl_warn": 1e-9, "kl_stop": 1e-8}  # any edit is a collapse
NEVER = {
    "kl_warn": 1e8,
    "kl_stop": 1e9,
    "perplexity_warn": 1e8,
    "perplexity_stop": 1e9,
    "retention_warn": 0,
    "retention_stop": 0,
}
FACTS = runs.facts(6)


@pytest.fixture(scope="module")
def store() -> StatsStore:
    return runs.shared_store()


def begin(path: Path, store: StatsStore, **changes: object) -> EditSession:
    return runs.open_run(path, runs.model(), store=store, **{"health_every": 1, **NEVER, **changes})


# ---------------------------------------------------------------- what is measured


def test_heldout_text_is_plain_and_states_none_of_our_facts():
    texts = heldout_texts()
    assert len(texts) >= 25 and len(set(texts)) == len(texts) and all(len(t) > 30 for t in texts)
    everything = "\n".join(texts)
    assert not [r.subject for r in bundled_facts() if r.subject in everything]


def test_an_unedited_model_is_at_no_distance_from_itself():
    model = runs.model()
    check = HealthCheck(model, WeightsState(model).base)
    report = check.measure(CONFIG, [], 1.0, {})
    assert (report.status, report.kl, report.reasons) == ("ok", 0.0, ())
    assert report.perplexity == report.perplexity_base > 1
    assert (report.retention, report.asked) == (None, 0)


def test_divergence_is_the_mean_kl_of_the_base_to_the_edited():
    base, now = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    expected = torch.nn.functional.kl_div(now, base, reduction="batchmean", log_target=True)
    assert divergence(base, now) == pytest.approx(float(expected), rel=1e-5)
    assert divergence(base, base) == 0.0
    assert divergence(base, torch.full_like(base, math.nan)) == math.inf


def test_loss_is_that_of_perplexity_however_the_rows_are_batched(monkeypatch):
    model = runs.model()
    texts = heldout_texts()[:6]
    rows = text_windows(model, texts, window=10)
    whole = read(model, rows)
    monkeypatch.setattr(health, "MAX_LOGITS", 30 * 320)
    parts = read(model, rows)
    assert math.exp(whole.loss) == pytest.approx(perplexity(model, texts, window=10), rel=1e-4)
    assert parts.loss == pytest.approx(whole.loss, rel=1e-5)
    torch.testing.assert_close(parts.log_probs, whole.log_probs, rtol=1e-4, atol=1e-4)
    assert len(whole.log_probs) >= health.KL_POSITIONS


@pytest.mark.parametrize(
    ("kl", "ratio", "retention", "asked", "status", "reason"),
    [
        (0.1, 1.0, None, 0, "ok", None),
        (0.31, 1.0, None, 0, "warn", "KL to the unedited model is 0.31, limit 0.3"),
        (2.1, 1.0, None, 0, "stop", "KL to the unedited model is 2.10, limit 2"),
        (0.1, 1.2, None, 0, "warn", "perplexity over the unedited model's is 1.20, limit 1.15"),
        (0.1, 2.5, None, 0, "stop", "perplexity over the unedited model's is 2.50, limit 2"),
        (0.1, 1234.4, None, 0, "stop", "perplexity over the unedited model's is 1234, limit 2"),
        (0.1, 3.2e22, None, 0, "stop", "perplexity over the unedited model's is 3e+22, limit 2"),
        (math.inf, math.inf, None, 0, "stop", "KL to the unedited model is not finite, limit 2"),
        (0.1, math.nan, None, 0, "stop", "is not finite, limit 2"),
        (0.1, 1.0, 0.6, 10, "warn", "retention of 10 earlier edits is 0.60, limit 0.7"),
        (0.1, 1.0, 0.2, 20, "stop", "retention of 20 earlier edits is 0.20, limit 0.3"),
        (0.1, 1.0, 0.0, 9, "ok", None),
        (0.4, 1.0, 0.2, 20, "stop", "KL to the unedited model is 0.40, limit 0.3"),
    ],
)
def test_limits(kl, ratio, retention, asked, status, reason):
    found, reasons = judge(CONFIG, kl, (10 * ratio, 10.0), retention, asked)
    assert found == status
    assert (reason is None) == (reasons == ()) and (reason is None or reasons[0].endswith(reason))


# ---------------------------------------------------------------- in a session


def test_every_batch_is_measured_and_recorded(tmp_path, store):
    with begin(tmp_path / "run", store) as session:
        reports = runs.edit_all(session, FACTS)
        for number, report in enumerate(reports):
            found = report.health
            assert found is not None and found.status == "ok" and found.kl > 0
            assert report.event.body["health"] == json.loads(json.dumps(found.as_json()))
            assert found.drift == {int(k): v for k, v in report.event.body["drift"].items()}
            earlier = [r for other in reports[:number] for r in other.records]
            assert found.asked == sum(r.status == "written" for r in earlier)
            assert found.reached == sum(r.status != "failed" for r in report.records) / 2
        edited = session.content_hash
    with begin(tmp_path / "off", store, health_every=0) as session:
        assert all(r.health is None for r in runs.edit_all(session, FACTS))
        assert session.content_hash == edited, "looking changes nothing"


def test_health_is_looked_at_every_so_many_batches(tmp_path, store):
    with begin(tmp_path / "run", store, health_every=2) as session:
        assert [r.health is not None for r in runs.edit_all(session, FACTS)] == [False, True, False]


def test_at_most_twenty_edits_that_took_and_still_hold_are_asked(tmp_path, store, monkeypatch):
    monkeypatch.setattr("nmke.writing.MOST_ASKED", 2)
    asked: list[list[str]] = []
    measure = HealthCheck.measure

    def spied(self: HealthCheck, config: EditConfig, old: list, *rest: object) -> object:
        asked.append([request.id for request in old])
        return measure(self, config, old, *rest)

    monkeypatch.setattr(HealthCheck, "measure", spied)
    for run in ("one", "two"):
        with begin(tmp_path / run, store, batch_size=1, **runs.TAKES) as session:
            again = replace(FACTS[0], id="again", target_new="is")
            runs.edit_all(session, [*FACTS[:5], again])
            failed = {e.request.id for event in session.log() for e in event.edits if e.status == "failed"}
    assert asked[: len(asked) // 2] == asked[len(asked) // 2 :], "the sample depends on the seed alone"
    assert max(map(len, asked)) == 2 and not failed & {name for names in asked for name in names}
    assert "e000" not in asked[-1], "what is being superseded is not asked"


def test_stop_keeps_the_batch_and_raises(tmp_path, store):
    with begin(tmp_path / "run", store, **ALWAYS) as session:
        with pytest.raises(HealthError, match=r"is saved, but .*: KL to the unedited model is") as found:
            session.edit_batch(FACTS[:2])
        assert found.value.exit_code == 6
        assert len(session.ledger.active()) == 1 and len(session.changed()) == 2
        assert session.log()[-1].body["health"]["status"] == "stop"
        session.verify()


def test_rollback_takes_the_batch_back_bit_for_bit(tmp_path, store):
    with begin(tmp_path / "run", store) as session:
        runs.edit_all(session, FACTS[:2])
    with begin(tmp_path / "run", store, **ALWAYS, on_collapse="rollback") as session:
        before, content = runs.bits(session.model), session.content_hash
        with pytest.raises(HealthError, match="was taken back, bit for bit: KL to the unedited model"):
            runs.edit_all(session, FACTS[2:])
        assert runs.bits(session.model) == before and session.content_hash == content
        assert [event.kind for event in session.log()] == ["edit", "edit", "undo"]
        assert session.log()[-1].body["rolled_back"] and session.ledger.active() == [1]
        session.verify()


@pytest.mark.parametrize(
    "limits", [{**ALWAYS, "on_collapse": "continue"}, {"kl_warn": 1e-9}], ids=["stop", "warn"]
)
def test_continue_and_warnings_only_say_so(tmp_path, store, caplog, limits):
    with begin(tmp_path / "run", store, **limits) as session, caplog.at_level(logging.WARNING, "nmke"):
        assert len(runs.edit_all(session, FACTS[:4])) == 2
    assert len([r for r in caplog.records if "KL to the unedited model" in r.message]) == 2


def test_a_replay_records_health_and_is_not_stopped_by_it(tmp_path, store):
    with begin(tmp_path / "run", store, **ALWAYS, on_collapse="continue") as session:
        runs.edit_all(session, FACTS[:4])
    with begin(tmp_path / "run", store, **ALWAYS) as session:
        (first, second) = session.revert("e000")
        assert first.health.status == second.health.status == "stop"


def test_numbers_that_are_not_finite_stop_and_are_null_in_the_record(tmp_path, store, monkeypatch):
    with begin(tmp_path / "run", store) as session:
        runs.edit_all(session, FACTS[:2])
        broken = health.Reading(math.nan, torch.full((3, 4), math.nan))
        monkeypatch.setattr(health, "read", lambda *_: broken)
        with pytest.raises(HealthError, match="KL to the unedited model is not finite"):
            session.edit_batch(FACTS[2:4])
        found = session.log()[-1].body["health"]
        assert found["kl"] is None and found["perplexity"] is None and found["perplexity_base"] is not None
