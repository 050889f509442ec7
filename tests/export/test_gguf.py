import shutil

import gguf
import numpy as np
import pytest
import torch
from tests.export.runs import INITIALIZER_RANGE, PROMPTS, tiny_run
from tests.models.test_load import write_gguf
from tests.tiers import sampled
from tests.tiny import save_tiny, tiny_llama, tiny_tokenizer

from nmke.errors import ExportError, NumericsError
from nmke.export import exporters
from nmke.export.base import last_logits
from nmke.export.changes import changes, logits_apart
from nmke.export.gguf import export_gguf
from nmke.export.gguf_file import dequantised, differing, open_gguf, write_patched
from nmke.models.load import load_model
from nmke.session import EditSession

EDITED = "blk.0.ffn_down.weight"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    path = tmp_path_factory.mktemp("base") / "tiny.gguf"
    tokenizer = tiny_tokenizer()
    write_gguf(path, tiny_llama(vocab_size=len(tokenizer), initializer_range=INITIALIZER_RANGE), tokenizer)
    return path


@pytest.fixture(scope="module")
def session(base, tmp_path_factory):
    with tiny_run(tmp_path_factory.mktemp("edited"), base) as session:
        yield session


TYPES = [(dtype, *kind) for dtype in ("float32", "bfloat16") for kind in (("F32", 0.0), ("F16", 5e-3))]


@pytest.mark.parametrize(
    ("dtype", "edited_type", "limit"),
    sampled(TYPES, lambda one: one[:2] in (("float32", "F32"), ("bfloat16", "F16"))),
)
def test_file_loads_as_the_session(tmp_path, base, dtype, edited_type, limit):
    with tiny_run(tmp_path, base, dtype=dtype) as session:
        report = exporters.get("gguf")(session, tmp_path / "out", edited_type=edited_type)
        limit = limit if dtype == "float32" else 10 * limit
        assert report.largest_difference <= min(limit, report.tolerance)
        (file,) = (tmp_path / "out").glob("*.gguf")
        assert file.name == "tiny-edited.gguf" and str(file) in report.load
        loaded = load_model(str(file), dtype=dtype, device="cpu")
        assert logits_apart(last_logits(loaded, PROMPTS), last_logits(session.model, PROMPTS)) <= limit
        found = loaded.layout.layers[0].down_proj.weight
        wanted = session.weights.projection(0).read()
        if edited_type == "F16":
            wanted = wanted.to(torch.float16).to(wanted.dtype)
        assert torch.equal(found, wanted)
        assert "The capital of Japan is" in (tmp_path / "out" / "README.md").read_text()


def test_everything_but_the_edited_tensors_is_copied_bit_for_bit(tmp_path, base, session):
    report = export_gguf(session, tmp_path / "out")
    original, copy = open_gguf(base), open_gguf(tmp_path / "out" / "tiny-edited.gguf")
    assert differing(original, copy) == [EDITED]
    assert [t.name for t in copy.tensors] == [t.name for t in original.tensors]
    for name, field in original.fields.items():
        assert copy.fields[name].types == field.types
        if name != "GGUF.kv_count":
            assert copy.fields[name].contents() == field.contents()
    assert "1 edited tensors as F32" in report.notes[0]


@pytest.fixture
def quantised(tmp_path):
    """A file with a quantised tensor, an empty string, an odd array and a large alignment."""
    path = tmp_path / "quantised.gguf"
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_custom_alignment(128)
    writer.add_key_value("x.empty", "", gguf.GGUFValueType.STRING)
    writer.add_array("x.names", ["ä", "", "\udce4".encode("utf-8", "surrogateescape").decode("latin-1")])
    data = np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32)
    blocks = gguf.quants.quantize(data, gguf.GGMLQuantizationType.Q4_1)
    writer.add_tensor("first", data[:3, :5].copy())
    writer.add_tensor(EDITED, blocks, raw_dtype=gguf.GGMLQuantizationType.Q4_1)
    writer.add_tensor("last", blocks[:2].copy(), raw_dtype=gguf.GGMLQuantizationType.Q4_1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_quantised_tensor_is_replaced_by_floats(tmp_path, quantised, dtype):
    reader = open_gguf(quantised)
    new = np.arange(256, dtype=dtype).reshape(4, 64)
    write_patched(reader, tmp_path / "new.gguf", {EDITED: new})
    copy = open_gguf(tmp_path / "new.gguf")
    assert differing(reader, copy) == [EDITED]
    assert np.array_equal(dequantised(copy, EDITED), new.astype(np.float32))
    assert dequantised(copy, "nothing") is None
    assert all(tensor.data_offset % 128 == 0 for tensor in copy.tensors)


def test_copy_without_replacement_is_the_same_file(tmp_path, quantised):
    write_patched(open_gguf(quantised), tmp_path / "same.gguf", {})
    assert (tmp_path / "same.gguf").read_bytes() == quantised.read_bytes()


def test_differing_sees_metadata_tensors_and_surplus(tmp_path, base, quantised):
    found = differing(open_gguf(quantised), open_gguf(base))
    assert found[:2] == ["metadata", "first"] and "token_embd.weight" in found


def test_after_undo_the_file_is_the_bases_and_says_so(tmp_path, base):
    with tiny_run(tmp_path, base) as session:
        session.undo()
        report = export_gguf(session, tmp_path / "out")
    assert report.notes == ("nothing is changed: a copy of the base's file",)
    assert differing(open_gguf(base), open_gguf(tmp_path / "out" / "tiny-edited.gguf")) == []


def test_base_without_a_gguf_file_is_refused(tmp_path):
    with (
        tiny_run(tmp_path, save_tiny(tmp_path / "llama", tiny_llama)) as session,
        pytest.raises(ExportError, match=r"did not come from a GGUF file.*--to hf.*convert_hf_to_gguf.py"),
    ):
        export_gguf(session, tmp_path / "out")


def test_another_file_in_the_bases_place_is_refused(tmp_path, base):
    place = tmp_path / "model.gguf"
    shutil.copyfile(base, place)
    with tiny_run(tmp_path, place) as session:
        place.unlink()
        tokenizer = tiny_tokenizer()
        write_gguf(place, tiny_llama(vocab_size=len(tokenizer), seed=1), tokenizer)
        with pytest.raises(ExportError, match=r"model.gguf' has another 'blk.0.ffn_down.weight'"):
            export_gguf(session, tmp_path / "out")
        place.write_bytes(b"GGUF" + bytes(64))
        with pytest.raises(ExportError, match=r"model.gguf' cannot be read"):
            export_gguf(session, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_part_of_a_split_file_is_refused(tmp_path):
    writer = gguf.GGUFWriter(str(tmp_path / "part.gguf"), "llama")
    writer.add_uint16("split.count", 2)
    writer.add_tensor("x", np.zeros(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ExportError, match=r"one of several parts; join them"):
        open_gguf(tmp_path / "part.gguf")


def test_weight_too_large_for_float16_is_refused(tmp_path, base):
    with tiny_run(tmp_path, base) as session:
        session.weights.projection(0).read()[0, 0] = 1e6
        with pytest.raises(NumericsError, match=r"does not fit into F16; export it as F32"):
            export_gguf(session, tmp_path / "out", edited_type="F16")


def test_existing_output_needs_force(tmp_path, session):
    export_gguf(session, tmp_path / "out")
    with pytest.raises(ExportError, match=r"exists; .*force"):
        export_gguf(session, tmp_path / "out")
    export_gguf(session, tmp_path / "out", force=True)


@pytest.mark.model
def test_smollm2_is_patched_in_its_own_file(tmp_path):
    with EditSession.open("smollm2-135m", tmp_path / "run", device="cpu") as session:
        weight = session.weights.projection(4).read()
        generator = torch.Generator().manual_seed(0)
        weight[:, :100] += 0.05 * torch.randn(weight[:, :100].shape, generator=generator)
        report = export_gguf(session, tmp_path / "out")
        (change,) = changes(session)
        assert change.name == "model.layers.4.mlp.down_proj.weight" and len(change.columns) == 100
        assert (report.largest_difference, report.content_hash) == (0.0, session.content_hash)
        copy = open_gguf(tmp_path / "out" / "smollm2-135m-edited.gguf")
        assert np.array_equal(dequantised(copy, "blk.4.ffn_down.weight"), weight.numpy())
        kinds = {t.name: t.tensor_type.name for t in copy.tensors}
        assert kinds["blk.4.ffn_down.weight"] == "F32" and kinds["blk.3.ffn_down.weight"] == "Q4_1"
    assert 98e6 < report.bytes < 103e6
