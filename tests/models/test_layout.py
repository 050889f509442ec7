"""The probe finds a layout that holds up, or refuses with a name; nothing between, and leaves no trace."""

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
import transformers
from packaging.version import Version
from tests import tiny
from tests.models import families
from tests.tiers import sampled
from torch import nn
from transformers import LlamaModel, PreTrainedModel, T5Config, T5ForConditionalGeneration

from nmke.errors import LayoutError
from nmke.models.layout import ModelLayout, probe_layout
from nmke.models.norms import FrozenNorm
from nmke.models.tracing import record_inputs, record_outputs
from nmke.models.weights import DownProjection

IDS = torch.tensor([[5, 9, 17, 33, 40, 61]])

# What transformers 5.23 ships and the probe must find; a family missing here may be found or refused.
FOUND_NAMES = """
apertus arcee bamba beam biogpt bitnet bloom codegen cohere cohere2
cohere_compass_text ctrl cwm diffllama doge emu3 ernie4_5 exaone4 falcon falcon_h1 flint fuyu gemma gemma2
gemma3 gemma3_text gemma4 gemma4_text gemma4_unified gemma4_unified_text glm glm4 got_ocr2 gpt-sw3 gpt2
gpt_bigcode gpt_neo gpt_neox gpt_neox_japanese gptj granite granite_swa helium hunyuan_v1_dense hyperclovax
internlm3 iquestcoder jais2 lfm2 lfm3 llama minicpm3 ministral ministral3 mistral moshi
moss_transcribe_diarize mpt nanochat nemotron olmo olmo2 olmo3 olmo_hybrid opt persimmon phi phi3
phi4_multimodal qwen2 qwen3 qwen3_5 qwen3_5_text seed_oss smollm3 stablelm starcoder2
vaultgemma xglm youtu
"""
# An older transformers lacks some of them, and some of its classes are not those that the lists are about.
LISTED = Version(transformers.__version__) >= Version("5.23")
MUST_FIND = FOUND_NAMES.split() if LISTED else []
# Refused, by what the message must say.
MUST_REFUSE = {
    "mixture of experts": "aria_text cohere2_moe deepseek_v2 deepseek_v3 ernie4_5_moe gpt_oss granitemoe jamba jetmoe "
    "llama4 mixtral olmoe phimoe qwen2_moe qwen3_moe qwen3_next solar_open",
    "no MLP down-projection": "falcon_mamba mamba mamba2 nemotron_h rwkv zamba zamba2",
    "no final norm": "bart bert-generation blenderbot-small camembert git marian mvp openai-gpt plbart roberta trocr",
    "LayerNorm and RMSNorm": "bert big_bird blt electra ernie roc_bert roformer",
    "exactly once": "hrm_text mllama",
    "needed is": "cpmant gemma3n_text xlnet",
    "no plain stack": "xlm",
    "no table of token ids": "musicgen musicgen_melody",
    "behind padding": "bigbird_pegasus blenderbot mbart pegasus recurrent_gemma whisper xlstm",
}
REASON = {family: reason for reason, names in MUST_REFUSE.items() for family in names.split() if LISTED}
OFTEN_NAMES = """
bloom cohere2 falcon gemma2 gemma3 gemma3_text glm4 gpt2 gpt_neox gptj granite llama mistral mpt olmo2 opt phi phi3
qwen2 qwen3 qwen3_5 smollm3 stablelm starcoder2
"""
OFTEN = {*OFTEN_NAMES.split(), *(names.split()[0] for names in MUST_REFUSE.values())}


@pytest.mark.parametrize("family", sampled(families.FAMILIES, OFTEN.__contains__))
def test_every_shipped_family_is_found_or_refused(family: str) -> None:
    model = build(family)
    try:
        layout = probe_layout(model)
    except LayoutError as error:
        assert family not in MUST_FIND, str(error)
        assert REASON.get(family, "cannot be edited: ") in str(error)
        # No refusal in this list is an accident of the tiny sizes: the model itself runs on token ids.
        assert not LISTED or "a forward pass over" not in str(error)
        return
    assert family not in REASON
    assert layout.n_layers == len(layout.d_mlp) >= 2
    check_writes(model, layout)
    check_readout(model, layout)


def build(family: str) -> PreTrainedModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what a family's own code deprecates is not ours to mend
        try:
            return families.tiny_family(family)
        except Exception as error:
            if family in families.UNBUILDABLE or not LISTED:
                pytest.skip(f"{families.UNBUILDABLE.get(family, 'not buildable')}: {type(error).__name__}")
            raise


@torch.no_grad()
def check_writes(model: PreTrainedModel, layout: ModelLayout) -> None:
    """Zeroing a neuron's column takes coefficient x column out of what the layer writes, and nothing else."""
    modules = {
        (i, kind): getattr(p, kind) for i, p in enumerate(layout.layers) for kind in ("block", "down_proj")
    }
    with record_outputs(modules, clone=True) as before, record_inputs(modules) as inputs:
        model(input_ids=IDS, use_cache=False)
    for index, parts in enumerate(layout.layers):
        matrix = DownProjection(parts.down_proj)
        coefficients = inputs[index, "down_proj"].reshape(6, parts.d_mlp)
        neuron = coefficients.abs().sum(dim=0).argmax().reshape(1)
        column = matrix.columns(neuron)
        expected = -coefficients[:, neuron] * column[:, 0]
        matrix.restore(neuron, torch.zeros_like(column))
        with record_outputs(modules, clone=True) as after:
            model(input_ids=IDS, use_cache=False)
        matrix.restore(neuron, column)
        assert expected.norm() > 0
        written = (after[index, "down_proj"] - before[index, "down_proj"]).reshape(expected.shape)
        torch.testing.assert_close(written, expected, rtol=1e-3, atol=1e-5)
        change = (after[index, "block"] - before[index, "block"])[0]
        if parts.direct_write:
            torch.testing.assert_close(change, expected, rtol=1e-3, atol=1e-5)
        else:
            assert change.norm() > 0
            assert (change - expected).norm() > 1e-2 * expected.norm()


@torch.no_grad()
def check_readout(model: PreTrainedModel, layout: ModelLayout) -> None:
    """Last layer, final norm, unembedding and logit map give the model's logits; the frozen norm equals the norm."""
    with record_outputs({"last": layout.layers[-1].block}, clone=True) as seen:
        logits = model(input_ids=IDS, use_cache=False).logits
    hidden = seen["last"]
    assert hidden.shape == (1, 6, layout.d_model)
    again = layout.logit_map.apply(layout.unembedding(layout.final_norm(hidden)))
    assert again.shape[-1] == layout.d_vocab
    torch.testing.assert_close(again, logits.float(), rtol=1e-4, atol=1e-5)
    norm = FrozenNorm.probe(layout.final_norm, layout.d_model)
    frozen = norm.apply(hidden, norm.scale_at(hidden))
    torch.testing.assert_close(frozen, layout.final_norm(hidden), rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not LISTED, reason="the lists are those of transformers 5.23")
def test_expected_families_exist() -> None:
    assert set(MUST_FIND) <= set(families.FAMILIES)
    assert set(REASON) <= set(families.FAMILIES)
    assert len(MUST_FIND) >= 80


@pytest.mark.parametrize(
    ("builder", "name", "norm", "direct"),
    [
        (tiny.tiny_llama, "model.layers.1.mlp.down_proj", "model.norm", True),
        (tiny.tiny_gpt2, "transformer.h.1.mlp.c_proj", "transformer.ln_f", True),
        (tiny.tiny_opt, "model.decoder.layers.1.fc2", "model.decoder.final_layer_norm", True),
        (tiny.tiny_gemma3, "model.layers.1.mlp.down_proj", "model.norm", False),
        (tiny.tiny_granite, "model.layers.1.mlp.down_proj", "model.norm", False),
    ],
)
def test_parts_have_their_names(
    builder: Callable[[], PreTrainedModel], name: str, norm: str, direct: bool
) -> None:
    model = builder()
    layout = probe_layout(model)
    assert [parts.index for parts in layout.layers] == [0, 1]
    assert layout.layers[1].down_proj_name == name
    assert layout.layers[1].down_proj is model.get_submodule(name)
    assert layout.layers[1].block is model.get_submodule(layout.layers[1].block_name)
    assert layout.final_norm_name == norm
    assert layout.unembedding is model.get_output_embeddings()
    assert (layout.d_model, layout.d_vocab, layout.n_layers) == (32, 64, 2)
    assert layout.d_mlp == (64, 64)
    assert layout.direct_write is direct


def test_mlp_is_the_holder_or_the_projection_itself() -> None:
    assert type(probe_layout(tiny.tiny_llama()).layers[0].mlp).__name__ == "LlamaMLP"
    parts = probe_layout(tiny.tiny_opt()).layers[0]
    assert parts.mlp is parts.down_proj


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("builder", [tiny.tiny_llama, tiny.tiny_gpt2, tiny.tiny_gemma2, tiny.tiny_granite])
def test_other_types_give_the_same_layout(builder: Callable[[], PreTrainedModel], dtype: torch.dtype) -> None:
    model = builder()
    expected = probe_layout(model)
    found = probe_layout(model.to(dtype))
    assert [p.down_proj_name for p in found.layers] == [p.down_proj_name for p in expected.layers]
    assert found.direct_write == expected.direct_write
    assert found.logit_map == expected.logit_map


def test_an_mlp_as_wide_as_the_stream_is_found() -> None:
    layout = probe_layout(tiny.tiny_llama(intermediate_size=32))
    assert layout.layers[0].down_proj_name == "model.layers.0.mlp.down_proj"


def test_probing_leaves_no_trace() -> None:
    model = tiny.tiny_llama().train()
    model.model.layers[0].eval()
    model.requires_grad_(False)
    modes = [module.training for module in model.modules()]
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        probe_layout(model)
        assert not torch.is_grad_enabled()
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def test_a_refusal_leaves_no_trace() -> None:
    model = tiny.tiny_mixtral().train()
    with pytest.raises(LayoutError):
        probe_layout(model)
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_inference_mode_does_not_matter() -> None:
    model = tiny.tiny_llama()
    with torch.inference_mode():
        assert probe_layout(model).direct_write


def test_experts_are_refused_by_name() -> None:
    with pytest.raises(LayoutError, match=r"MixtralForCausalLM cannot be edited: .*mlp\.experts.*MoE"):
        probe_layout(tiny.tiny_mixtral())


class ExpertList(nn.Module):
    """Two MLPs in a list, as older mixtures of experts keep them; `used` of them run."""

    def __init__(self, mlp: nn.Module, used: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList([mlp, copy.deepcopy(mlp)])
        self.used = used

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return torch.stack([expert(hidden) for expert in self.experts[: self.used]]).mean(dim=0)


class WithAdapter(nn.Module):
    """A linear layer with a low-rank branch beside it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.base(hidden) + self.up(self.down(hidden))


class Doubled(nn.Linear):
    """A linear layer whose output is not its weight times its input."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(hidden)


def change_block(model: PreTrainedModel, change: Callable[[nn.Module], None]) -> PreTrainedModel:
    change(model.model.layers[1])
    return model


def as_int8(weight: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(weight.detach().to(torch.int8), requires_grad=False)


def with_adapter(block: nn.Module) -> None:
    block.mlp.down_proj = WithAdapter(block.mlp.down_proj)


def with_experts(used: int) -> Callable[[nn.Module], None]:
    def change(block: nn.Module) -> None:
        block.mlp = ExpertList(block.mlp, used)

    return change


def with_doubled(block: nn.Module) -> None:
    block.mlp.down_proj = Doubled(64, 32, bias=False)


def with_parametrisation(block: nn.Module) -> None:
    nn.utils.parametrizations.weight_norm(block.mlp.down_proj)


def with_int8(block: nn.Module) -> None:
    block.mlp.down_proj.weight = as_int8(block.mlp.down_proj.weight)


def with_packed_buffer(block: nn.Module) -> None:
    block.mlp.down_proj.register_buffer("qweight", torch.zeros(8, 32, dtype=torch.int32))


def on_meta(block: nn.Module) -> None:
    block.mlp.down_proj.to("meta")


def without_mlp(block: nn.Module) -> None:
    block.mlp = nn.Identity()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_experts(2), r"2 candidates for the down-projection: .*experts\.0\.down_proj.*MoE"),
        (with_experts(1), r"3 of 6 .*did not run exactly once.*MoE.*for every expert"),
        (with_adapter, r"'model.layers.1.mlp' changes what .*base.* adapters"),
        (with_doubled, r"'model.layers.1.mlp.down_proj' is no plain linear layer"),
        (with_parametrisation, r"computes its weight"),
        (with_int8, r"stored as torch.int8; quantised weights"),
        (with_packed_buffer, r"packs weights as torch.int32; quantised weights"),
        (on_meta, r"not in memory \(meta device\)"),
        (without_mlp, r"'model.layers.1' has no MLP down-projection: .*candidates: none"),
    ],
)
def test_what_cannot_be_edited_is_named(change: Callable[[nn.Module], None], message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        probe_layout(change_block(tiny.tiny_llama(), change))


def test_layers_that_share_weights_are_refused() -> None:
    model = tiny.tiny_llama()
    model.model.layers[1].mlp.down_proj.weight = model.model.layers[0].mlp.down_proj.weight
    with pytest.raises(LayoutError, match=r"layers\.1.* shares its weights with .*layers\.0"):
        probe_layout(model)


def test_an_encoder_decoder_is_refused() -> None:
    config = T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    with pytest.raises(
        LayoutError, match="T5ForConditionalGeneration cannot be edited: it is an encoder-decoder"
    ):
        probe_layout(T5ForConditionalGeneration(config))


def test_a_model_without_unembedding_is_refused() -> None:
    with pytest.raises(LayoutError, match="no unembedding"):
        probe_layout(LlamaModel(tiny.tiny_llama().config))


def test_an_encoder_that_looks_ahead_is_refused() -> None:
    model = tiny.tiny_llama()
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    model.model.config._attn_implementation = "sdpa"
    model.model.config.is_causal = False
    with pytest.raises(LayoutError, match="position 0 depends on later ones"):
        probe_layout(model)


def test_a_failing_forward_is_a_layout_error_with_its_cause() -> None:
    model = tiny.tiny_llama()
    model.model.layers[0].mlp.up_proj = nn.Linear(7, 64)
    with pytest.raises(
        LayoutError, match="a forward pass over 6 token ids was asked for; found RuntimeError"
    ) as caught:
        probe_layout(model)
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_logits_of_another_form_are_refused() -> None:
    class Shifted(type(tiny.tiny_llama())):  # type: ignore[misc]
        def forward(self, *args: object, **kwargs: object) -> object:
            output = super().forward(*args, **kwargs)
            output.logits = output.logits.square()
            return output

    model = tiny.tiny_llama()
    model.__class__ = Shifted
    with pytest.raises(LayoutError, match="neither a constant factor nor a tanh bound"):
        probe_layout(model)
