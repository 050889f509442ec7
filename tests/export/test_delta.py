import itertools
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tests.export.runs import PROMPTS, tiny_base, tiny_run
from tests.tiers import sampled
from tests.tiny import tiny_gpt2, tiny_llama

from nmke.cli.main import run
from nmke.errors import ConfigError, ExportError, NumericsError
from nmke.export.base import last_logits
from nmke.export.delta import FILE, apply_delta, export_delta, read_delta
from nmke.models.cache import weights_fingerprint
from nmke.models.load import load_model


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_base(tmp_path_factory.mktemp("base") / "llama", tiny_llama)


@pytest.fixture(scope="module")
def session(base, tmp_path_factory):
    with tiny_run(tmp_path_factory.mktemp("edited"), base) as session:
        yield session


@pytest.fixture(scope="module")
def delta(session, tmp_path_factory):
    return export_delta(session, tmp_path_factory.mktemp("out") / "delta").path


def rewritten(delta, folder, change, **metadata):
    """A copy of the delta with tensors or metadata changed."""
    folder.mkdir()
    tensors = load_file(delta / FILE)
    change(tensors)
    with safe_open(delta / FILE, framework="pt") as file:
        save_file(tensors, folder / FILE, metadata={**file.metadata(), **metadata})
    return folder


def test_the_session_exports_by_the_formats_name(session, tmp_path):
    first = session.export("delta", str(tmp_path / "out"))
    assert first.path == tmp_path / "out" and read_delta(first.path)
    with pytest.raises(ExportError):
        session.export("delta", tmp_path / "out")
    assert session.export("delta", tmp_path / "out", force=True) == first
    with pytest.raises(ConfigError, match="did you mean 'delta'"):
        session.export("delt", tmp_path / "other")


TYPES = itertools.product((tiny_llama, tiny_gpt2), ("float32", "bfloat16"))


@pytest.mark.parametrize(
    ("builder", "dtype"), sampled(TYPES, lambda one: (one[0] is tiny_llama) == (one[1] == "bfloat16"))
)
def test_delta_on_the_base_is_the_session_bit_for_bit(tmp_path, builder, dtype):
    source = tiny_base(tmp_path / "base", builder)
    with tiny_run(tmp_path, source, dtype=dtype) as session:
        before = weights_fingerprint(session.model.model)
        report = session.export("delta", tmp_path / "out")
        assert weights_fingerprint(session.model.model) == before
        assert (report.content_hash, report.largest_difference) == (session.content_hash, 0.0)
        applied = apply_delta(tmp_path / "out", str(source), device="cpu")
        assert weights_fingerprint(applied.model) == before
        logits = zip(last_logits(applied, PROMPTS), last_logits(session.model, PROMPTS), strict=True)
        assert all(torch.equal(a, b) for a, b in logits)
    assert report.bytes < sum(file.stat().st_size for file in source.iterdir()) / 4


def test_only_changed_columns_are_kept(session, delta):
    (changed,) = session.changed()
    tensors = load_file(delta / FILE)
    assert set(tensors) == {f"{changed.name}.columns", f"{changed.name}.values"}
    assert tensors[f"{changed.name}.values"].shape == (32, changed.columns)
    assert changed.columns < changed.of
    read = read_delta(delta)
    assert (read.base_fingerprint, read.content_hash) == (session.model.fingerprint, session.content_hash)


def test_card_lists_the_changed_facts(session, delta):
    card = (delta / "README.md").read_text()
    assert "The capital of Japan is" in card and "Paris" in card and "nmke apply delta" in card
    assert json.loads((delta / "nmke-export.json").read_text())["content_hash"] == session.content_hash


def test_loaded_model_is_changed_in_place_and_is_then_its_own_base(base, delta, session):
    model = load_model(str(base), device="cpu")
    before = model.fingerprint
    assert apply_delta(delta / FILE, model) is model
    assert model.fingerprint == weights_fingerprint(session.model.model) != before
    with pytest.raises(ExportError, match=r"goes on weights .* give that base, unedited"):
        apply_delta(delta, model)


def test_another_base_is_refused_and_left_alone(tmp_path, delta):
    other = load_model(str(tiny_base(tmp_path / "other", tiny_llama, seed=1)), device="cpu")
    before = weights_fingerprint(other.model)
    with pytest.raises(
        ExportError, match=r"goes on weights \w{12} \(.*, float32\), .* has \w{12} \(float32\)"
    ):
        apply_delta(delta, other)
    assert weights_fingerprint(other.model) == before


def test_base_in_another_type_is_refused(base, delta):
    with pytest.raises(ExportError, match=r"has \w{12} \(bfloat16\); give that base, unedited"):
        apply_delta(delta, load_model(str(base), dtype="bfloat16", device="cpu"))


def _nudge(tensors):
    name = next(n for n in tensors if n.endswith(".values"))
    tensors[name][0, 0] += 1e-3


def _shift(tensors):
    name = next(n for n in tensors if n.endswith(".columns"))
    tensors[name] += 64


def _rename(tensors):
    for name in list(tensors):
        tensors["x" + name] = tensors.pop(name)


def _add(tensors):
    tensors["more"] = torch.zeros(1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_nudge, r"cannot be applied: it leads to content hash \w{12}, not \w{12}; the model is unchanged"),
        (_shift, r"cannot be applied: the columns of .* do not fit \[32, 64\]"),
        (_rename, r"is missing or damaged \('model.layers.0.mlp.down_proj.weight.columns'\)"),
        (_add, r"holds 'more', which it does not list"),
    ],
)
def test_damaged_content_is_refused(tmp_path, base, delta, change, message):
    model = load_model(str(base), device="cpu")
    with pytest.raises(ExportError, match=message):
        apply_delta(rewritten(delta, tmp_path / "bad", change), model)
    assert weights_fingerprint(model.model) == model.fingerprint == read_delta(delta).base_fingerprint


@pytest.mark.parametrize(
    ("hashes", "message"),
    [
        ({"model.layers.0.mlp.down_proj.weight": "0"}, r"is not the matrix it was made on"),
        ("not JSON", r"is missing or damaged"),
    ],
)
def test_wrong_matrix_hashes_are_refused(tmp_path, base, delta, hashes, message):
    text = hashes if isinstance(hashes, str) else json.dumps(hashes)
    bad = rewritten(delta, tmp_path / "bad", lambda tensors: None, base_sha256=text)
    with pytest.raises(ExportError, match=message):
        apply_delta(bad, str(base), device="cpu")


def test_cut_foreign_and_missing_files_are_refused(tmp_path, delta):
    whole = (delta / FILE).read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(
        ExportError, match=r"cut.safetensors' is missing or damaged .*; export or copy it again"
    ):
        read_delta(tmp_path / "cut.safetensors")
    with pytest.raises(ExportError, match=r"nothing' is missing or damaged"):
        read_delta(tmp_path / "nothing")
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors", metadata={"schema": "other/1"})
    with pytest.raises(ExportError, match=r"has schema 'other/1', expected 'nmke.delta/1'"):
        read_delta(tmp_path / "other.safetensors")


def test_after_undo_the_delta_is_empty_and_says_so(tmp_path, base):
    with tiny_run(tmp_path, base) as session:
        session.undo()
        report = export_delta(session, tmp_path / "out")
        assert report.notes == ("nothing is changed: an empty delta",)
        applied = apply_delta(tmp_path / "out", str(base), device="cpu")
    assert applied.fingerprint == read_delta(tmp_path / "out").base_fingerprint


def test_existing_output_needs_force(tmp_path, session, delta):
    with pytest.raises(ExportError, match=r"exists; .*force"):
        export_delta(session, delta)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    with pytest.raises(ExportError, match=r"is not replaced"):
        export_delta(session, tmp_path / "mine", force=True)
    assert export_delta(session, delta, force=True).content_hash == session.content_hash


def test_nan_is_not_exported(tmp_path, base):
    with tiny_run(tmp_path, base) as session:
        session.model.layout.layers[0].down_proj.weight[0, 0] = float("nan")
        with pytest.raises(NumericsError, match=r"holds NaN or infinity; nothing was exported"):
            export_delta(session, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_apply_command_writes_a_model_folder(tmp_path, base, delta, session, capsys):
    out = tmp_path / "model"
    assert run(["apply", str(delta), str(base), "-o", str(out), "--json", "--device", "cpu"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["schema"], said["content_hash"]) == ("nmke.apply/1", session.content_hash)
    model = load_model(str(out), device="cpu")
    assert weights_fingerprint(model.model) == weights_fingerprint(session.model.model)
    card = (out / "README.md").read_text()
    assert "The capital of Japan is" in card and "vllm serve model" in card and "nmke apply" not in card
    assert run(["apply", str(delta), str(base), "-o", str(out), "--device", "cpu"]) == 1
    assert "exists" in capsys.readouterr().err
    bare = tmp_path / "handed-on.safetensors"
    bare.write_bytes(Path(delta / FILE).read_bytes())
    assert run(["apply", str(bare), str(base), "-o", str(out), "--force", "--device", "cpu"]) == 0
    assert session.content_hash in capsys.readouterr().out.replace("\n", "").replace(" ", "")
    assert "came without its list of facts" in (out / "README.md").read_text()
