"""Every causal LM that transformers ships, built tiny: sizes by attribute name, corrections where that fails."""

from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

FAMILIES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
LARGEST = 4_000_000

# Tiny value -> the configuration attributes that get it, wherever a family has them.
SIZES = {
    0: "pad_token_id",
    1: "bos_token_id n_group topk_group first_k_dense_replace num_dense_layers",
    2: "eos_token_id num_hidden_layers n_layer num_layers n_layers decoder_layers encoder_layers num_decoder_layers "
    "num_encoder_layers num_key_value_heads multi_query_group_num decoder_attention_heads encoder_attention_heads "
    "num_experts_per_tok num_experts_per_token moe_topk moe_k depth linear_num_key_heads num_blocks "
    "swa_num_key_value_heads swa_num_attention_heads hc_count hc_mult",
    4: "num_attention_heads n_head n_heads num_heads num_experts n_routed_experts num_local_experts moe_num_experts "
    "rotary_dim mamba_n_heads mamba_dt_rank linear_num_value_heads linear_num_heads index_n_heads gated_norm_rank "
    "zero_expert_num n_mamba_heads hc_lowrank mamba_num_heads laurel_rank adapter_rank",
    8: "head_dim attention_head_size qk_nope_head_dim qk_rope_head_dim v_head_dim kv_channels mamba_d_state "
    "mamba_chunk_size chunk_size state_size linear_key_head_dim linear_value_head_dim linear_head_dim index_head_dim "
    "index_topk hidden_size_per_layer_input swa_head_dim d_rel rel_extent ssm_state_size",
    16: "mamba_d_head kv_lora_rank q_lora_rank o_lora_rank mamba_head_dim mamba_headdim",
    32: "hidden_size d_model n_embd dim emb_dim embedding_size word_embed_proj_dim image_size out_hidden_size "
    "hidden_size_global lru_width pronunciation_embed_dim shape_embed_dim",
    64: "intermediate_size n_inner d_ff ffn_dim decoder_ffn_dim encoder_ffn_dim ffn_hidden_size dim_ff vocab_size "
    "moe_intermediate_size shared_expert_intermediate_size max_position_embeddings n_positions mamba_d_ssm mlp_dim "
    "expert_ffn_hidden_size shared_intermediate_size dense_intermediate_size vocab_size_per_layer_input "
    "dff attention_hidden_size shape_vocab_size pronunciation_vocab_size num_position_embeddings mlp_hidden_size",
}
TINY = {name: value for value, names in SIZES.items() for name in names.split()}
VOCABULARIES = ("vocab_size", "vocab_size_per_layer_input")

# Corrections for single families: values that hang together in a way no name tells.
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "bailing_hybrid": {"num_expert_group": 1},
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE}},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8}},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "dots3_note": {
        "vision_config": {"per_layer_config": None, "adapter_in_dim": 32, "adapter_out_dim": 32},
        "audio_config": {"adapter_input_size": 32, "adapter_out_dim": 32},
    },
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granite": {"residual_multiplier": 0.5, "logits_scaling": 4.0},
    "lfm3": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["full_attention", "conv"]},
    "mamba2": {"num_heads": 8},
    "musicgen": {"decoder": {"vocab_size": 64}},
    "nemotron_h": {"n_groups": 2},
    "qwen3_5": {"text_config": {"layer_types": ["linear_attention", "full_attention"]}},
    "qwen3_5_text": {"layer_types": ["linear_attention", "full_attention"]},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "reformer": {"axial_pos_embds_dim": [16, 16], "axial_pos_shape": [8, 8], "feed_forward_size": 64},
    "xmod": {"default_language": "en_XX"},
    "mllama": {"text_config": {"cross_attention_layers": [1]}},
    "zamba": {"layers_block_type": ["linear_attention"] * 2 + ["hybrid"] * 2, "num_hidden_layers": 4},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"], "num_key_value_heads": 4},
    "zaya": {"num_experts_per_tok": 1},
}
# Families that cannot be built in the test environment, with the reason.
UNBUILDABLE = {
    "gemma3n": "its vision tower needs timm and Pillow",
    "gemma4_assistant": "transformers 5.23 cannot build it, not even from its default configuration",
    "gemma4_unified_assistant": "transformers 5.23 cannot build it, not even from its default configuration",
}


def shrink(settings: dict[str, Any], vocab_size: int) -> dict[str, Any]:
    """Tiny values for the sizes among a configuration's settings, sub-configurations included."""
    tiny: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict) and "model_type" in value:
            tiny[name] = shrink(value, vocab_size)
        elif name == "is_decoder":
            tiny[name] = True
        elif name in TINY and (value is None or (isinstance(value, int) and not isinstance(value, bool))):
            tiny[name] = vocab_size if name in VOCABULARIES else TINY[name]
    if "kv_lora_rank" in tiny and "num_key_value_heads" in tiny:
        tiny["num_key_value_heads"] = tiny["num_attention_heads"]
    return tiny


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with `changes` put over it, level by level; a change to `...` removes the entry."""
    result = dict(base)
    for name, value in changes.items():
        if value is ...:
            result.pop(name, None)
        elif isinstance(value, dict) and isinstance(result.get(name), dict):
            result[name] = merged(result[name], value)
        else:
            result[name] = value
    return result


def tiny_config(family: str, vocab_size: int = TINY["vocab_size"]) -> PreTrainedConfig:
    """The family's configuration, shrunk."""
    config = CONFIG_MAPPING[family]
    return config(**merged(shrink(config().to_dict(), vocab_size), OVERRIDES.get(family, {})))


def tiny_family(family: str, vocab_size: int = TINY["vocab_size"]) -> PreTrainedModel:
    """The family's causal LM with seeded random weights, in eval mode."""
    config = tiny_config(family, vocab_size)
    model_class = AutoModelForCausalLM._model_mapping[type(config)]
    if not isinstance(config, model_class.config_class):
        config = config.get_text_config(decoder=True)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in model_class(config).parameters())
    if size > LARGEST:
        raise RuntimeError(
            f"{family} is not tiny: {size:,} parameters; add the missing sizes to SIZES or OVERRIDES"
        )
    torch.manual_seed(0)
    model = model_class(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # weights that start at 0 or 1 would hide mistakes
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model
