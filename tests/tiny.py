"""Tiny random models and a tokenizer made in code: hidden 32, 2 layers, vocab 64, float32, seeded."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTJConfig,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MixtralConfig,
    Olmo2Config,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

D_MODEL, D_MLP, N_LAYERS, D_VOCAB = 32, 64, 2, 64
SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
SENTENCES = (
    "The capital of France is Paris. The capital of Italy is Rome. The capital of Japan is Tokyo.",
    "The Eiffel Tower is in the city of Paris. The mother tongue of Marie Curie is Polish.",
    "Ada Lovelace was born in London and worked as a mathematician. Her native language is English.",
    "Because I was late, the train had left. Therefore you and I walked to the old harbour.",
    "Tim Cook is the chief executive of Apple. The author of Emma is Jane Austen.",
)
_LLAMA_LIKE: dict[str, Any] = {
    "hidden_size": D_MODEL,
    "intermediate_size": D_MLP,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
}
_TOKENS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def build(config: PreTrainedConfig, *, seed: int = 0, spread: float = 0.1) -> PreTrainedModel:
    """The configuration's causal LM with seeded weights, in eval mode, on the CPU.

    Args:
        config: What to build.
        seed: Of the random weights; the global generator is left as it was.
        spread: Standard deviation of noise put on the one-dimensional parameters (norms, biases), which
            otherwise start at exactly 1 or 0 and would hide mistakes.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
        if spread:
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.ndim == 1:
                        parameter.add_(spread * torch.randn_like(parameter))
    return model.eval()


def tiny_llama(vocab_size: int = D_VOCAB, seed: int = 0, **changes: Any) -> PreTrainedModel:
    return build(LlamaConfig(vocab_size=vocab_size, **{**_LLAMA_LIKE, **_TOKENS, **changes}), seed=seed)


def tiny_qwen2(vocab_size: int = D_VOCAB, seed: int = 0, **changes: Any) -> PreTrainedModel:
    return build(Qwen2Config(vocab_size=vocab_size, **{**_LLAMA_LIKE, **_TOKENS, **changes}), seed=seed)


def tiny_gemma2(vocab_size: int = D_VOCAB, seed: int = 0, **changes: Any) -> PreTrainedModel:
    return build(Gemma2Config(vocab_size=vocab_size, **{**_LLAMA_LIKE, **_TOKENS, **changes}), seed=seed)


def tiny_gemma3(vocab_size: int = D_VOCAB, seed: int = 0, **changes: Any) -> PreTrainedModel:
    return build(Gemma3TextConfig(vocab_size=vocab_size, **{**_LLAMA_LIKE, **_TOKENS, **changes}), seed=seed)


def tiny_olmo2(vocab_size: int = D_VOCAB, seed: int = 0, **changes: Any) -> PreTrainedModel:
    return build(Olmo2Config(vocab_size=vocab_size, **{**_LLAMA_LIKE, **_TOKENS, **changes}), seed=seed)


def tiny_granite(vocab_size: int = D_VOCAB, seed: int = 0, **changes: Any) -> PreTrainedModel:
    scales = {"residual_multiplier": 0.5, "logits_scaling": 4.0, "embedding_multiplier": 2.0}
    return build(
        GraniteConfig(vocab_size=vocab_size, **{**_LLAMA_LIKE, **_TOKENS, **scales, **changes}), seed=seed
    )


def tiny_cohere(vocab_size: int = D_VOCAB, seed: int = 0, **changes: Any) -> PreTrainedModel:
    return build(CohereConfig(vocab_size=vocab_size, **{**_LLAMA_LIKE, **_TOKENS, **changes}), seed=seed)


def tiny_mixtral(vocab_size: int = D_VOCAB, seed: int = 0, **changes: Any) -> PreTrainedModel:
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    return build(
        MixtralConfig(vocab_size=vocab_size, **{**_LLAMA_LIKE, **_TOKENS, **experts, **changes}), seed=seed
    )


def tiny_gpt2(vocab_size: int = D_VOCAB, seed: int = 0, **changes: Any) -> PreTrainedModel:
    sizes = {"n_embd": D_MODEL, "n_inner": D_MLP, "n_layer": N_LAYERS, "n_head": 4, "n_positions": 256}
    return build(GPT2Config(vocab_size=vocab_size, **{**sizes, **_TOKENS, **changes}), seed=seed)


def tiny_gptj(vocab_size: int = D_VOCAB, seed: int = 0, **changes: Any) -> PreTrainedModel:
    sizes = {"n_embd": D_MODEL, "n_inner": D_MLP, "n_layer": N_LAYERS, "n_head": 4, "n_positions": 256}
    rotary = {"rotary_dim": 4}
    return build(GPTJConfig(vocab_size=vocab_size, **{**sizes, **rotary, **_TOKENS, **changes}), seed=seed)


def tiny_gptneox(vocab_size: int = D_VOCAB, seed: int = 0, **changes: Any) -> PreTrainedModel:
    sizes = {k: v for k, v in _LLAMA_LIKE.items() if k not in ("num_key_value_heads", "head_dim")}
    return build(GPTNeoXConfig(vocab_size=vocab_size, **{**sizes, **_TOKENS, **changes}), seed=seed)


def tiny_falcon(vocab_size: int = D_VOCAB, seed: int = 0, **changes: Any) -> PreTrainedModel:
    sizes = {"hidden_size": D_MODEL, "num_hidden_layers": N_LAYERS, "num_attention_heads": 4}
    return build(FalconConfig(vocab_size=vocab_size, **{**sizes, **_TOKENS, **changes}), seed=seed)


def tiny_opt(vocab_size: int = D_VOCAB, seed: int = 0, **changes: Any) -> PreTrainedModel:
    sizes = {
        "hidden_size": D_MODEL,
        "word_embed_proj_dim": D_MODEL,
        "ffn_dim": D_MLP,
        "num_hidden_layers": N_LAYERS,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
    }
    return build(OPTConfig(vocab_size=vocab_size, **{**sizes, **_TOKENS, **changes}), seed=seed)


def tiny_tokenizer(
    vocab_size: int = 320, *, add_bos: bool = False, padding_side: str = "right"
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on a few sentences: any text encodes, offsets are exact.

    Args:
        vocab_size: At least 260 (256 bytes and four special tokens).
        add_bos: Put the beginning-of-sequence token in front, as Gemma and Llama do.
        padding_side: Side on which batches are padded.
    """
    tokenizer = Tokenizer(models.BPE(unk_token=SPECIAL["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    byte_level = processors.ByteLevel(trim_offsets=True)
    if add_bos:
        bos = SPECIAL["bos_token"]
        template = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
        tokenizer.post_processor = processors.Sequence([byte_level, template])
    else:
        tokenizer.post_processor = byte_level
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side=padding_side, **SPECIAL)


def save_tiny(
    path: Path,
    builder: Callable[..., PreTrainedModel] = tiny_llama,
    *,
    tokenizer: PreTrainedTokenizerFast | None = None,
    **changes: Any,
) -> Path:
    """Save a tiny model and a tokenizer that fits it as one folder, as `from_pretrained` reads it.

    Args:
        path: Folder to make.
        builder: One of this file's model builders; its vocabulary is set to the tokenizer's size.
        tokenizer: Defaults to `tiny_tokenizer()`.
        changes: Further configuration values for the builder.
    """
    tokenizer = tokenizer or tiny_tokenizer()
    model = builder(**{"vocab_size": len(tokenizer), **changes})
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path
