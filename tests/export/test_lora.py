import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.export.runs import PROMPTS, tiny_base, tiny_run
from tests.tiny import tiny_gpt2, tiny_llama

from nmke.errors import ConfigError, ExportError, NumericsError
from nmke.export import exporters, lora
from nmke.export.base import last_logits
from nmke.export.changes import changes, logits_apart
from nmke.export.lora import export_lora
from nmke.export.low_rank import direction_energies, factors, residual_energies, rounding_energy
from nmke.models.cache import weights_fingerprint
from nmke.models.load import load_model

peft = pytest.importorskip("peft")
# peft 0.21 asks transformers 5.23 for this property.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_base(tmp_path_factory.mktemp("base") / "llama", tiny_llama)


@pytest.fixture(scope="module")
def session(base, tmp_path_factory):
    with tiny_run(tmp_path_factory.mktemp("edited"), base) as session:
        yield session


def with_adapter(source, adapter, dtype="float32"):
    """The base loaded anew, with the adapter that peft puts on it."""
    loaded = load_model(str(source), dtype=dtype, device="cpu")
    loaded.model = peft.PeftModel.from_pretrained(loaded.model, adapter).eval()
    return loaded


def apart(model, session):
    with torch.no_grad():
        return logits_apart(last_logits(model, PROMPTS), last_logits(session.model, PROMPTS))


# 0.0625 is the last place of a bfloat16 logit of 8 to 16
@pytest.mark.parametrize(("dtype", "limit"), [("float32", 1e-5), ("bfloat16", 0.07)])
@pytest.mark.parametrize("builder", [tiny_llama, tiny_gpt2])
def test_peft_gives_the_sessions_logits(tmp_path, builder, dtype, limit):
    source = tiny_base(tmp_path / "base", builder)
    with tiny_run(tmp_path, source, dtype=dtype) as session:
        before = weights_fingerprint(session.model.model)
        report = exporters.get("lora")(session, tmp_path / "adapter")
        assert weights_fingerprint(session.model.model) == before
        assert report.largest_difference <= min(limit, report.tolerance)
        assert apart(load_model(str(source), dtype=dtype, device="cpu"), session) > 2 * limit
        adapted = with_adapter(source, tmp_path / "adapter", dtype)
        assert apart(adapted, session) <= limit
        adapted.model = adapted.model.merge_and_unload()
        assert apart(adapted, session) <= limit


def test_adapter_of_a_float32_run_works_on_a_bfloat16_copy(tmp_path, base, session):
    export_lora(session, tmp_path / "adapter")
    copy = load_model(str(base), dtype="bfloat16", device="cpu")
    without = apart(copy, session)
    with session.base():
        scatter = apart(copy, session)  # what bfloat16 itself does to the logits
    adapted = apart(with_adapter(base, tmp_path / "adapter", "bfloat16"), session)
    assert adapted <= 1.5 * scatter < without


def round_to_int8(model):
    """Every linear weight as eight-bit quantisation leaves it: whole steps of its row's largest entry / 127."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2 and "embed" not in name:
                step = weight.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / 127
                weight.copy_((weight / step).round() * step)


def test_adapter_adds_the_exact_update_to_a_quantised_copy(tmp_path, base, session):
    export_lora(session, tmp_path / "adapter")
    expected = load_model(str(base), device="cpu")
    round_to_int8(expected.model)
    plain = last_logits(expected, PROMPTS)
    with torch.no_grad():
        for change in changes(session):
            expected.model.get_parameter(change.name).add_(change.edited - change.base)
    quantised = load_model(str(base), device="cpu")
    round_to_int8(quantised.model)
    quantised.model = peft.PeftModel.from_pretrained(quantised.model, tmp_path / "adapter").eval()
    with torch.no_grad():
        found, wanted = last_logits(quantised, PROMPTS), last_logits(expected, PROMPTS)
    assert logits_apart(found, wanted) <= 1e-5 < logits_apart(plain, wanted)


def test_config_names_the_edited_layers_only(tmp_path, base, session):
    report = export_lora(session, tmp_path / "adapter")
    config = peft.LoraConfig.from_pretrained(tmp_path / "adapter")
    assert (config.r, config.lora_alpha, config.fan_in_fan_out) == (8, 8, False)
    assert config.target_modules == {"model.layers.0.mlp.down_proj"}
    assert config.base_model_name_or_path == str(base)
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {name: tuple(t.shape) for name, t in tensors.items()} == {
        "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight": (8, 64),
        "base_model.model.model.layers.0.mlp.down_proj.lora_B.weight": (32, 8),
    }
    assert "--max-lora-rank 8" in report.load and "PeftModel.from_pretrained" in report.load
    assert report.notes[1].startswith("rank 8, alpha 8; residual") and "rounding" not in report.notes[1]
    assert "The capital of Japan is" in (tmp_path / "adapter" / "README.md").read_text()


def test_rounding_to_bfloat16_does_not_raise_the_rank(tmp_path, base):
    with tiny_run(tmp_path, base, dtype="bfloat16") as session:
        report = export_lora(session, tmp_path / "adapter")
    assert (
        report.notes[1].startswith("rank 8,") and "of which rounding to bfloat16 explains" in report.notes[1]
    )


def test_gpt2_adapter_says_that_weights_lie_transposed(tmp_path):
    with tiny_run(tmp_path, tiny_base(tmp_path / "base", tiny_gpt2)) as session:
        export_lora(session, tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["fan_in_fan_out"] is True


def test_rank_too_small_is_refused_with_the_one_that_holds(tmp_path, session):
    with pytest.raises(ExportError, match=r"rank 1 leaves .* of the change .* give rank 8"):
        export_lora(session, tmp_path / "adapter", rank=1)
    assert not (tmp_path / "adapter").exists()
    with pytest.raises(ConfigError, match=r"rank 0 asked; a LoRA adapter has rank 1 or more"):
        export_lora(session, tmp_path / "adapter", rank=0)


def test_rank_beyond_the_models_width_is_filled_with_zeros(tmp_path, base, session):
    report = export_lora(session, tmp_path / "adapter", rank=600)
    assert report.notes[-1] == "vLLM takes ranks up to 512, this one is for peft"
    assert apart(with_adapter(base, tmp_path / "adapter"), session) <= 1e-5


def test_change_of_full_rank_takes_a_larger_rank(tmp_path, base):
    with tiny_run(tmp_path, base, edited=False) as session:
        weight = session.weights.projection(0).read()
        weight += 0.01 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
        report = export_lora(session, tmp_path / "adapter")
    assert report.notes[1].startswith("rank 32,")


def test_adapter_that_was_written_wrong_is_not_kept(tmp_path, session, monkeypatch):
    def damaged(tensors, path, metadata):
        save_file({name: 2 * tensor for name, tensor in tensors.items()}, path, metadata)

    monkeypatch.setattr(lora, "save_file", damaged)
    with pytest.raises(ExportError, match=r"logits that differ by .* export as hf or delta, which are exact"):
        export_lora(session, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_run_without_changes_has_no_adapter(tmp_path, base):
    with tiny_run(tmp_path, base) as session:
        session.undo()
        with pytest.raises(ExportError, match=r"changes nothing, so there is no adapter to write"):
            export_lora(session, tmp_path / "adapter")


def test_nan_is_not_exported(tmp_path, base):
    with tiny_run(tmp_path, base) as session:
        session.model.layout.layers[0].down_proj.weight[0, 0] = float("nan")
        with pytest.raises(NumericsError, match=r"holds NaN or infinity"):
            export_lora(session, tmp_path / "adapter")


def test_existing_output_needs_force(tmp_path, session):
    export_lora(session, tmp_path / "adapter")
    with pytest.raises(ExportError, match=r"exists; .*force"):
        export_lora(session, tmp_path / "adapter")
    export_lora(session, tmp_path / "adapter", force=True)


def test_factors_are_the_best_approximation():
    generator = torch.Generator().manual_seed(0)
    update = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    energies, vectors = direction_energies(update)
    expected = torch.linalg.svdvals(update).square()
    torch.testing.assert_close(energies[:4], expected)
    for rank in range(8):
        left, right = factors(update, vectors, rank)
        assert (left.shape, right.shape) == ((6, rank), (rank, 4))
        lost = (update - left.double() @ right.double()).square().sum()
        torch.testing.assert_close(lost, residual_energies(energies)[min(rank, 6)], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rounding_energy_is_what_rounding_does(dtype):
    exact = torch.randn(200, 300, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rounded = exact.to(dtype)
    done = float((rounded.double() - exact).square().sum())
    assert math.isclose(rounding_energy(rounded), done, rel_tol=0.02)
    assert rounding_energy(torch.zeros(3, 3, dtype=dtype)) == 0


def test_zeros_of_either_sign_are_told_apart(session):
    (change,) = changes(session)
    base = torch.zeros_like(change.base)
    edited = base.clone()
    edited[3, 5] = -0.0
    assert type(change)(0, "m", "m.weight", base, edited).columns.tolist() == [5]
