"""Edit, log, undo, eval, verify, ask and export on a tiny model; every schema that scripts read."""

import json
import signal
from pathlib import Path

import pytest
import torch
from tests.cli.conftest import FACTS, Nmke, write_facts

from nmke.evaluation.target_scores import predictions
from nmke.models.load import EditableModel, load_model
from nmke.session import EditSession


def test_edit_log_undo_eval_verify_ask_export_round_trip(
    nmke: Nmke, source: Path, facts: Path, settings: list[str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    edited = nmke("edit", source, "--facts", facts, "-o", run, "--json", *settings)
    assert edited.code == 0, edited.err
    result = edited.json
    assert result["schema"] == "nmke.edit/1"
    assert result["run"] == str(run) and result["method"] == "nmke"
    assert result["n_edits"] == 4 == result["n_written"] + result["n_failed"] + result["n_known"]
    assert result["seconds_per_edit"] > 0 and result["peak_rss_mb"] > 50
    scores = result["scores"]["teacher_forced"]
    assert scores["n"] == 4 and len(scores["intervals"]["reliability"]) == 2
    assert {"reliability", "generalization", "locality"} <= scores.keys()
    changed = result["changed_tensors"]
    assert changed and all(0 < c["columns"] < c["of"] == 64 for c in changed)
    assert result["config"]["batch_size"] == 2
    assert (run / "recipe.yaml").is_file()

    log = nmke("log", run, "--json").json
    assert log["schema"] == "nmke.log/1" and log["content_hash"] == result["content_hash"]
    assert [edit["id"] for edit in log["edits"]] == ["f0", "f1", "f2", "f3"]

    first = nmke("eval", run, "--facts", facts, "--json")
    assert first.json["schema"] == "nmke.eval/1" and first.json["content_hash"] == result["content_hash"]
    for metric in ("reliability", "generalization", "locality", "n"):
        assert first.json["protocols"]["teacher_forced"][metric] == scores[metric]
    assert nmke("eval", run, "--json").json["n_facts"] == 4

    verified = nmke("verify", run, "--json")
    assert verified.code == 0 and verified.json["content_hash"] == result["content_hash"]
    asked = nmke("ask", run, "The capital of France is", "--compare", "--json", "--tokens", "3").json
    assert asked["schema"] == "nmke.ask/1" and isinstance(asked["base_answer"], str)

    out = tmp_path / "exported"
    exported = nmke("export", run, "--to", "hf", "-o", out, "--json")
    assert exported.code == 0, exported.err
    assert exported.json["largest_difference"] <= 1e-4
    reloaded = load_model(str(out))
    with EditSession.open(run) as session:
        assert reloaded.fingerprint == _fingerprint(session)
    assert "The capital of France is" in (out / "README.md").read_text()
    again = nmke("export", run, "-o", out)
    assert again.code == 1 and "--force" in again.err

    undone = nmke("undo", run, "-n", 1, "--json").json
    assert undone["undone"] == ["f2", "f3"] and undone["content_hash"] != result["content_hash"]
    assert nmke("undo", run).code == 0
    log = nmke("log", run, "--json").json
    assert log["n_active"] == 0 and log["content_hash"] == log["events"][0]["hash_before"]


def _fingerprint(session: EditSession) -> str:
    from nmke.models.cache import weights_fingerprint

    return weights_fingerprint(session.model.model)


def test_resume_ends_with_the_hash_of_an_unbroken_run(
    nmke: Nmke, source: Path, facts: Path, settings: list[str], tmp_path: Path
) -> None:
    whole = nmke("edit", source, "--facts", facts, "-o", "whole", "--json", *settings)
    part = write_facts(tmp_path / "part.jsonl", FACTS[:2])
    assert nmke("edit", source, "--facts", part, "-o", "broken", "--no-eval", *settings).code == 0
    rest = nmke("edit", source, "--facts", facts, "-o", "broken", "--resume", "--json")
    assert rest.code == 0, rest.err
    assert rest.json["content_hash"] == whole.json["content_hash"]
    assert (rest.json["n_edits"], rest.json["n_skipped"]) == (2, 2)
    nothing = nmke("edit", "broken", "--facts", facts, "--resume", "--json").json
    assert nothing["n_edits"] == 0 and nothing["content_hash"] == rest.json["content_hash"]
    refused = nmke("edit", "broken", "--facts", facts)
    assert refused.code == 3 and "--resume" in refused.err


def test_ctrl_c_finishes_the_batch_and_resume_goes_on(
    nmke: Nmke, source: Path, facts: Path, settings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = nmke("edit", source, "--facts", facts, "-o", "whole", "--json", *settings).json
    apply = EditSession.edit_batch

    def interrupted(self: EditSession, *args: object, **kwargs: object) -> object:
        signal.raise_signal(signal.SIGINT)
        return apply(self, *args, **kwargs)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(EditSession, "edit_batch", interrupted)
        stopped = nmke("edit", source, "--facts", facts, "-o", "run", "--json", *settings)
    assert stopped.code == 130
    assert stopped.json["interrupted"] and stopped.json["n_edits"] == 2
    rest = nmke("edit", "run", "--facts", facts, "--resume", "--json")
    assert rest.json["content_hash"] == whole["content_hash"]


def test_text_report_names_run_and_undo(nmke: Nmke, source: Path, settings: list[str]) -> None:
    done = nmke("edit", source, "-p", "The capital of {France} is", "-t", "Tokyo", *settings)
    assert done.code == 0, done.err
    assert "nmke-run-tiny-" in done.out and "nmke undo" in done.out and "p(new)" in done.out
    assert "not measured" in done.out
    assert max(map(len, done.out.splitlines())) <= 80
    assert "\x1b" not in done.out + done.err


def test_a_target_that_the_model_says_already_is_skipped(
    nmke: Nmke, source: Path, settings: list[str]
) -> None:
    prompt, said = _known_answer(load_model(str(source)))
    arguments = ("-p", prompt, "-t", said, "-o", "run", "--json")
    done = nmke("edit", source, *arguments, *settings)
    assert done.code == 0, done.err
    assert done.json["n_known"] == 1 and done.json["changed_tensors"] == []


def _known_answer(model: EditableModel) -> tuple[str, str]:
    """A prompt with its subject marked, and what the model says there in a way that its tokenizer reads back."""
    subjects = [first + second for first in "BDFGKLMNPRST" for second in ("ana", "omi", "erk", "ulo", "ia")]
    for template in ("In {} the train", "{} is late", "The {} spoke", "You and {} walked to the old"):
        for subject in subjects:
            prompt = template.replace("{}", subject)
            said = model.generate([prompt], 1)[0]
            if said.startswith(" ") and said.strip() and _accuracy(model, prompt, said.strip()) == 1.0:
                return template.replace("{}", f"{{{subject}}}"), said.strip()
    raise AssertionError("this tiny model says nothing that its tokenizer reads back; add templates")


def _accuracy(model: EditableModel, prompt: str, target: str) -> float:
    return predictions(model, [(prompt, target)])[0].accuracy


def test_strict_exits_6_and_keeps_the_run(nmke: Nmke, source: Path, facts: Path, settings: list[str]) -> None:
    done = nmke(
        "edit", source, "--facts", facts, "-o", "run", "--strict", "--json", "--lr", "1e-6", *settings
    )
    assert done.code == 6, done.err
    assert json.loads(done.out)["n_failed"] > 0 and "did not take" in done.err
    assert nmke("verify", "run").code == 0


def test_revert_takes_one_edit_out_and_says_the_cost(nmke: Nmke, edited: str) -> None:
    refused = nmke("revert", "run", "f1")
    assert refused.code == 2 and "3 other edits" in refused.err and "--yes" in refused.err
    done = nmke("revert", "run", "f1", "--yes", "--json")
    assert done.code == 0, done.err
    assert done.json["reverted"] == "f1" and done.json["n_active"] == 3
    shown = nmke("show", "run", "f1", "--json").json
    assert shown["schema"] == "nmke.show/1" and not shown["active"]
    assert "undone" in nmke("log", "run").out
    assert nmke("verify", "run").code == 0


def test_verify_exits_7_when_a_file_was_changed(nmke: Nmke, edited: str) -> None:
    batch = Path("run/edits/000001.safetensors")
    content = bytearray(batch.read_bytes())
    content[-1] ^= 1
    batch.write_bytes(content)
    assert nmke("verify", "run").code == 7


def test_eval_of_a_plain_model_says_what_locality_means(nmke: Nmke, source: Path, facts: Path) -> None:
    done = nmke("eval", source, "--facts", facts, "--protocol", "all", "--json")
    assert done.code == 0, done.err
    assert done.json["run"] is None and "against itself" in done.err
    assert set(done.json["protocols"]) == {"teacher_forced", "likelihood", "generation"}
    assert done.json["protocols"]["teacher_forced"]["locality"] == 1.0
    assert nmke("eval", source).code == 2


def test_chat_answers_each_line(nmke: Nmke, edited: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    monkeypatch.setattr(
        "sys.stdin", io.StringIO("The capital of France is\n\n/new\nThe train\n/quit\nnever\n")
    )
    done = nmke("chat", "run", "--compare", "--tokens", "2")
    assert done.code == 0, done.err
    assert done.out.count("edited") == 2 == done.out.count("base")


@pytest.mark.model
def test_real_model_learns_a_fact(nmke: Nmke, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("NMKE_CACHE")
    text = tmp_path / "text.txt"
    from nmke.stats.corpus import openers

    text.write_text("\n".join(openers()))
    small = ("--corpus", text, "--corpus-tokens", 2000, "--method", "alphaedit", "--layers", "7,8")
    fact = ("-p", "The capital of {France} is", "-t", "Lyon")
    done = nmke("edit", "smollm2-135m", *fact, "-o", tmp_path / "run", "--json", *small)
    assert done.code == 0, done.err
    assert done.json["n_written"] == 1 and done.json["scores"]["teacher_forced"]["reliability"] == 1.0
    assert done.json["probes"][0]["after"]["text"].startswith("Lyon")


def test_out_of_memory_exits_5_with_the_smaller_plan(
    nmke: Nmke, source: Path, facts: Path, settings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr("nmke.writing.optimise_targets", fail)
    done = nmke("edit", source, "--facts", facts, "-o", "run", "--no-eval", *settings)
    assert done.code == 5 and "--batch-size 1 (now 2)" in done.err
    assert not Path("run").exists(), "a run of which nothing came is not kept"
