"""Runs that changed what neurons read: every format holds it, or says that it cannot."""

import peft
import pytest
import torch
from tests.export.runs import PROMPTS, tiny_base, tiny_run
from tests.models.test_load import write_gguf
from tests.models.test_updates import new_neurons
from tests.tiny import tiny_gpt2, tiny_llama, tiny_tokenizer

from nmke.errors import ExportError
from nmke.export import exporters
from nmke.export.applied import apply_to_folder
from nmke.export.base import last_logits
from nmke.export.changes import logits_apart
from nmke.export.delta import apply_delta
from nmke.models.cache import weights_fingerprint
from nmke.models.load import load_model


@pytest.mark.parametrize("builder", [tiny_llama, tiny_gpt2])
def test_delta_and_folder_are_the_session_bit_for_bit(tmp_path, builder):
    source = tiny_base(tmp_path / "base", builder)
    with tiny_run(tmp_path, source, edited=False) as session:
        session.weights.apply([new_neurons(session.model.layout)])
        edited = weights_fingerprint(session.model.model)
        assert exporters.get("delta")(session, tmp_path / "delta").content_hash == session.content_hash
        assert exporters.get("hf")(session, tmp_path / "hf").largest_difference == 0.0
        assert weights_fingerprint(session.model.model) == edited
    applied = apply_delta(tmp_path / "delta", str(source), device="cpu")
    assert weights_fingerprint(applied.model) == edited
    apply_to_folder(tmp_path / "delta", str(source), tmp_path / "folder", device="cpu")
    assert weights_fingerprint(load_model(str(tmp_path / "folder"), device="cpu").model) == edited


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_lora_adapts_gate_and_up_as_peft_reads_them(tmp_path):
    base = tiny_base(tmp_path / "base")
    with tiny_run(tmp_path, base, edited=False) as session:
        session.weights.apply([new_neurons(session.model.layout)])
        report = exporters.get("lora")(session, tmp_path / "adapter")
        expected = last_logits(session.model, PROMPTS)
    assert report.notes[1].startswith("rank 8,")
    plain = load_model(str(base), device="cpu")
    before = last_logits(plain, PROMPTS)
    plain.model = peft.PeftModel.from_pretrained(plain.model, tmp_path / "adapter").eval()
    modules = {name.rpartition(".")[2] for name in plain.model.peft_config["default"].target_modules}
    assert modules == {"gate_proj", "up_proj", "down_proj"}
    found = last_logits(plain, PROMPTS)
    assert logits_apart(found, expected) <= 1e-4 < logits_apart(before, expected)


def test_lora_refuses_a_changed_bias(tmp_path):
    with tiny_run(tmp_path, tiny_base(tmp_path / "base", tiny_gpt2), edited=False) as session:
        session.weights.apply([new_neurons(session.model.layout)])
        with pytest.raises(
            ExportError, match=r"change the bias of 'transformer.h.1.mlp.c_fc', .* as hf or delta"
        ):
            exporters.get("lora")(session, tmp_path / "adapter")


def test_gguf_holds_gate_and_up(tmp_path):
    tokenizer = tiny_tokenizer()
    write_gguf(tmp_path / "b.gguf", tiny_llama(vocab_size=len(tokenizer), initializer_range=0.2), tokenizer)
    with tiny_run(tmp_path, tmp_path / "b.gguf", edited=False) as session:
        session.weights.apply([new_neurons(session.model.layout)])
        report = exporters.get("gguf")(session, tmp_path / "out")
        assert report.notes[0].startswith("3 edited tensors as F32")
        (file,) = (tmp_path / "out").glob("*.gguf")
        found = load_model(str(file), device="cpu").layout.layers[1]
        for part in ("down", "gate", "up"):
            wanted = session.model.layout.layers[1].matrix(part).read()
            assert torch.equal(found.matrix(part).read(), wanted)
