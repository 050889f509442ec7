"""Before and after: runs on tiny models, edited and not, with text and questions of ours."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import runs
from tests.evaluation.ability.test_measure import QUESTIONS

from nmke.editors import methods
from nmke.editors.method import STATISTICS, Method
from nmke.errors import ConfigError, NumericsError, RequestError
from nmke.evaluation import held_out, tasks
from nmke.evaluation.at_edit import score_at_edit
from nmke.evaluation.base_outputs import collect_base
from nmke.evaluation.fluency import references, write_and_judge
from nmke.evaluation.perplexity import perplexity, text_windows
from nmke.evaluation.portability import score_cases
from nmke.evaluation.protocols import PROTOCOLS, score
from nmke.facts import locate
from nmke.registry import Entry
from nmke.session import EditSession
from nmke.types import EditCase, EditRequest, Neighbor, Question

TEXTS = [f"The train {i} left the old harbour and you walked to the capital of {i}." * 3 for i in range(5)]
REQUESTS = [
    EditRequest(
        request.prompt,
        request.subject,
        request.target_new,
        request.id,
        paraphrases=(f"You saw the train go to {request.subject}",),
        neighborhood=(Neighbor(f"The harbour of {request.subject} is", "the old harbour"),),
    )
    for request in runs.facts(4)
]
CASES = [EditCase((request,)) for request in REQUESTS]


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / held_out.FILES[0]).write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    (folder / "bench_arc_easy_test.jsonl").write_text("".join(json.dumps(q) + "\n" for q in QUESTIONS))
    monkeypatch.setattr(locate, "_folders", lambda: [folder])
    monkeypatch.setenv("NMKE_CACHE", str(tmp_path / "cache"))
    return folder


@pytest.fixture
def session(tmp_path: Path) -> Any:
    with runs.open_run(tmp_path / "run") as opened:
        yield opened


@pytest.fixture
def edited(session: EditSession) -> EditSession:
    runs.edit_all(session, REQUESTS)
    return session


class WritesNothing:
    """A method whose update is zero."""

    def directions(self, keys: torch.Tensor, *_: Any) -> torch.Tensor:
        return torch.zeros_like(keys)


def test_a_method_that_writes_nothing_scores_rel_0_and_loc_1(
    session: EditSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Method(WritesNothing(), remembers=False)
    entry = Entry("writes-nothing", made, "this test", "none", needs=(STATISTICS,))
    monkeypatch.setitem(methods._entries, "writes-nothing", entry)
    session.config = runs.config(method="writes-nothing")
    wrong = _never_said(session)
    base = collect_base(session.model, wrong)
    before = runs.bits(session.model)
    for start in (0, 2):
        session.edit_batch(wrong[start : start + 2])
    assert runs.bits(session.model) == before
    cases = [EditCase((request,)) for request in wrong]
    last = score_cases(session.model, cases, base, tuple(PROTOCOLS)).to_json()
    assert last["teacher_forced"]["reliability"] == 0.0 and last["teacher_forced"]["locality"] == 1.0
    assert last["generation"]["exact_match"] == 0.0
    at_edit = score_at_edit(session, cases, base, ("teacher_forced",)).to_json()["teacher_forced"]
    assert (at_edit["reliability"], at_edit["locality"]) == (0.0, 1.0)


def _never_said(session: EditSession) -> list[EditRequest]:
    """The requests with a one-token target that the model does not say."""
    from dataclasses import replace

    found = []
    for request in REQUESTS:
        options = [replace(request, target_new=word) for word in ("the", "of", "is", "in")]
        scores = [score(session.model, [option]).rows[0] for option in options]
        said = [row.mean("teacher_forced", "reliability") == 1.0 for row in scores]
        found.append(options[said.index(False)])
    return found


def test_scores_at_edit_equal_those_taken_while_editing(session: EditSession) -> None:
    base = collect_base(session.model, REQUESTS)
    taken = []
    for start in (0, 2):
        session.edit_batch(REQUESTS[start : start + 2])
        table = score(session.model, REQUESTS[start : start + 2], base, tuple(PROTOCOLS))
        taken += list(table.rows)
    before = runs.bits(session.model)
    found = score_at_edit(session, CASES, base, tuple(PROTOCOLS))
    assert list(found.rows) == taken
    assert runs.bits(session.model) == before
    assert session.content_hash == session.ledger.event(2).hash_after
    last = score(session.model, REQUESTS, base, tuple(PROTOCOLS))
    assert found.protocols["teacher_forced"].n == 4 == last.protocols["teacher_forced"].n
    assert list(found.rows)[2:] == list(last.rows)[2:]


def test_walk_back_gives_the_head_back_when_it_is_left_early(edited: EditSession) -> None:
    before, states = runs.bits(edited.model), edited.walk_back()
    assert next(states).seq == 2
    assert next(states).seq == 1
    assert runs.bits(edited.model) != before
    states.close()
    assert runs.bits(edited.model) == before


def test_facts_that_the_run_does_not_hold_are_left_out_or_refused(edited: EditSession) -> None:
    other = EditCase((EditRequest("{} is", "Rome", "in", id="other"),))
    found = score_at_edit(edited, [*CASES[1:3], other], None, ("teacher_forced",))
    assert [row.id for row in found.rows] == ["e001", "e002"]
    with pytest.raises(RequestError, match="none of the 1 facts is in the run"):
        score_at_edit(edited, [other], None, ("teacher_forced",))


def test_a_case_of_two_facts_is_scored_after_its_last(session: EditSession) -> None:
    case = EditCase(tuple(REQUESTS[1:3]), "two", (Question("multi_hop", "The train left", ("the",)),))
    runs.edit_all(session, REQUESTS)
    found = score_at_edit(session, [case], None, ("teacher_forced",))
    assert [row.id for row in found.rows] == ["e001", "e002"]
    assert found.rows == score_cases(session.model, [case]).rows
    assert found.protocols["teacher_forced"].counts["portability"] == 1


def test_unedited_model_compared_with_itself_changes_nothing(session: EditSession, data: Path) -> None:
    for name in (tasks.WIKITEXT, tasks.FLUENCY, "arc_easy"):
        compared = tasks.compare(session, name, CASES)
        assert compared.before is not None
        assert compared.after.metrics.items() >= compared.before.metrics.items()
        assert all(change.mean == change.low == change.high == 0.0 for change in compared.change.values())
    assert tasks.compare(session, tasks.WIKITEXT).after.metrics["kl"].mean == 0.0


def test_edited_model_is_compared_question_by_question(edited: EditSession, data: Path) -> None:
    compared = tasks.compare(edited, "arc_easy", seed=2)
    with edited.base():
        before = tasks.measure_model(edited.model, "arc_easy").after
    assert compared.before is not None and compared.before.values == before.values
    for metric, change in compared.change.items():
        pairs = zip(compared.after.values[metric], before.values[metric], strict=True)
        assert change.mean == pytest.approx(sum(a - b for a, b in pairs) / 3)
    content = compared.to_json()
    assert set(content) == {"before", "after", "change"} and content["after"]["n"] == 3


def test_the_unedited_model_is_asked_once(
    edited: EditSession, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    real = tasks.measure
    monkeypatch.setattr(
        tasks, "measure", lambda model, name, **more: asked.append(name) or real(model, name, **more)
    )
    first, second = (tasks.compare(edited, "arc_easy", limit=2) for _ in range(2))
    assert len(asked) == 3  # before once, after twice
    assert first.before == second.before
    tasks.compare(edited, "arc_easy", limit=1)
    assert len(asked) == 5
    for path in (data.parent / "cache" / "scores").glob("*.json"):
        path.write_text("damaged")
    assert tasks.compare(edited, "arc_easy", limit=2).before.values == first.before.values


def test_perplexity_and_kl_equal_the_literal_ones(edited: EditSession, data: Path) -> None:
    found = held_out.wikitext(edited.model, base=edited.base)
    assert found.metrics["perplexity"].mean == pytest.approx(perplexity(edited.model, TEXTS), rel=1e-9)
    kls = []
    for row in text_windows(edited.model, TEXTS):
        ids = torch.tensor([row.ids])
        with torch.no_grad():
            now = edited.model.model(input_ids=ids).logits[0, :-1].double().log_softmax(dim=-1)
            with edited.base():
                old = edited.model.model(input_ids=ids).logits[0, :-1].double().log_softmax(dim=-1)
        kls.append(float((old.exp() * (old - now)).sum(dim=-1).mean()))
    assert found.values["kl"] == pytest.approx(kls, rel=1e-3, abs=1e-6)
    assert found.metrics["kl"].mean > 0.0
    assert held_out.wikitext(edited.model, limit=2, seed=3).n == 2


def test_kl_is_the_same_whatever_shares_a_batch(
    edited: EditSession, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = held_out.wikitext(edited.model, base=edited.base).values["kl"]
    monkeypatch.setattr(held_out, "KL_LOGITS", 1)
    assert held_out.wikitext(edited.model, base=edited.base).values["kl"] == pytest.approx(whole, abs=1e-5)


def test_damaged_weights_are_an_error_not_a_number(edited: EditSession, data: Path) -> None:
    with torch.no_grad():
        next(iter(edited.weights.matrices().values())).fill_(float("nan"))
    with pytest.raises(NumericsError, match="not finite"):
        held_out.wikitext(edited.model)


def test_published_wikitext_is_parted_at_its_headings(tmp_path: Path) -> None:
    path = tmp_path / "wikitext2_test.txt"
    path.write_text(
        " \n = The Boat = \n \n It floats . \n\n = = Sea = = \n\n Salt . \n = Ann = \n \n She sang . \n"
    )
    assert held_out.read_articles(path) == ["It floats . \n\n = = Sea = = \n\n Salt .", "She sang ."]


def test_texts_are_drawn_alike_and_judged_case_by_case(session: EditSession) -> None:
    cases = [
        EditCase(
            (REQUESTS[0],), generation_prompts=("France is", "France has"), attribute_prompts=("Rome is",)
        ),
        CASES[1],
    ]
    told = references(session.model, cases, seed=4)
    assert [len(some) for some in told] == [1, 0]
    found = write_and_judge(session.model, cases, told, seed=4)
    assert found == type(found)(
        **{**vars(write_and_judge(session.model, cases, told, seed=4)), "seconds": found.seconds}
    )
    assert found.metrics["fluency"].n == 2 and found.metrics["consistency"].n == 1
    assert 0.0 <= found.metrics["consistency"].mean <= 1.0 < found.metrics["fluency"].mean
    assert "consistency" not in write_and_judge(session.model, CASES[:1]).metrics


def test_task_names_are_read_and_checked() -> None:
    assert tasks.read_tasks("edits, lambada,edits") == ("edits", "lambada")
    assert set(tasks.read_tasks("general")) == set(tasks.task_names()) - {"fluency"}
    with pytest.raises(ConfigError, match="unknown task 'lambda'; did you mean 'lambada'"):
        tasks.read_tasks("lambda")
    with pytest.raises(ConfigError, match="no task in ','"):
        tasks.read_tasks(",")
