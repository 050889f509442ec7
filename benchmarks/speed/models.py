"""Models of any shape with random weights, and facts in made-up words, so that a measurement needs no download."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from nmke.models.load import EditableModel
from nmke.types import EditRequest


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama.

    Args:
        layers: Decoder layers.
        d_model, d_mlp, d_vocab: Widths.
        heads, kv_heads: Of the attention.
        edited: Layers to edit.
    """

    layers: int
    d_model: int
    d_mlp: int
    d_vocab: int
    heads: int
    kv_heads: int
    edited: tuple[int, ...]

    @property
    def block_parameters(self) -> int:
        """Weights of one block's matrices."""
        kv = self.d_model * self.kv_heads // self.heads
        return 2 * self.d_model**2 + 2 * self.d_model * kv + 3 * self.d_model * self.d_mlp


SHAPES = {
    "tiny": Shape(6, 64, 160, 512, 4, 2, (1, 2)),
    "smollm2": Shape(30, 576, 1536, 49152, 9, 3, (4, 5, 6, 7, 8)),
    "8b": Shape(32, 4096, 14336, 128256, 32, 8, (4, 5, 6, 7, 8)),
}
WORDS = 400


def word_tokenizer() -> PreTrainedTokenizerFast:
    """One token per made-up word."""
    vocabulary = {"<pad>": 0, "<unk>": 1, "</s>": 2, "<s>": 3, ".": 4}
    vocabulary |= {f"w{i}": len(vocabulary) + i for i in range(WORDS)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="</s>", bos_token="<s>"
    )


def random_model(shape: Shape, device: torch.device, dtype: torch.dtype) -> EditableModel:
    """A Llama of this shape, seeded."""
    config = LlamaConfig(
        hidden_size=shape.d_model, intermediate_size=shape.d_mlp, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads, vocab_size=shape.d_vocab,
        max_position_embeddings=2048, tie_word_embeddings=False, pad_token_id=0, bos_token_id=3, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return EditableModel.wrap(model, word_tokenizer(), "random")


def requests(count: int) -> list[EditRequest]:
    """Facts of the lengths that CounterFact has: a subject of two words, five words behind it, one for an answer."""
    return [
        EditRequest(
            f"w{i % 7} w{i % 11} {{}} w{i % 13} w{i % 17} w{i % 19}",
            f"w{20 + i % 300} w{30 + (i * 7) % 350}",
            f"w{40 + i % 350}",
            id=f"f{i}",
        )
        for i in range(count)
    ]


CONTEXTS = ("", *(" ".join(f"w{50 * start + i}" for i in range(10)) + " . " for start in range(1, 6)))
