"""Continue prompts: batched, left-padded, with every default of an instruct model's own settings spelled out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from nmke.errors import ConfigError, RequestError
from nmke.models.tokens import length_buckets, pad_batch
from nmke.models.tracing import contiguous_input

if TYPE_CHECKING:
    from nmke.models.load import EditableModel

TOKEN_BUDGET = 1 << 15  # prompts and new tokens of one batch; bounds the key-value cache
TOP_K = 64  # a drawn token is among so many likeliest


@dataclass(frozen=True)
class Decoding:
    """How to continue a prompt.

    Args:
        max_new_tokens: Most tokens to add to each.
        do_sample: Draw among the 64 likeliest tokens instead of taking the likeliest.
        seed: Makes the draws repeatable; torch's own generator is left as it was.
        temperature: Divides the logits when drawing.
        stop_at_newline: End each answer before the first line break that follows visible text.
        stop: End each answer before the first of these strings.
    """

    max_new_tokens: int
    do_sample: bool = False
    seed: int | None = None
    temperature: float = 1.0
    stop_at_newline: bool = False
    stop: tuple[str, ...] = ()

    def cut(self, text: str) -> str:
        """The answer's text up to where it ends."""
        text = first_line(text) if self.stop_at_newline else text
        return text[: min((text.index(mark) for mark in self.stop if mark in text), default=len(text))]

    @property
    def stops(self) -> bool:
        """Whether text can end an answer early."""
        return self.stop_at_newline or bool(self.stop)


class DrawTopK(LogitsProcessor):
    """Draws one of the likeliest tokens and leaves it as the only one possible.

    The library's own sampling makes one random number per token of the vocabulary, on one thread: 0.27 s of a
    0.35 s step for 128 prompts.
    """

    def __init__(self, temperature: float) -> None:
        self.temperature = temperature

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores with minus infinity everywhere but at the drawn token."""
        best, tokens = scores.float().topk(min(TOP_K, scores.shape[1]), dim=1)
        drawn = torch.multinomial(torch.softmax(best / self.temperature, dim=1), 1)
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens.gather(1, drawn), 0.0)


def continue_prompts(model: EditableModel, prompts: Sequence[str], decoding: Decoding) -> list[str]:
    """The new text behind each prompt, in order; greedy answers are those the prompts would get one by one.

    Args:
        model: The model as it is now.
        prompts: Plain text, not chat turns.
        decoding: See `Decoding`.

    Raises:
        RequestError: If a prompt is empty, or too long for the model.
        ConfigError: If no new token is asked for.
    """
    rows = [model.encoder.encode(prompt) for prompt in prompts]
    _check_lengths(model, rows, decoding.max_new_tokens)
    answers = [""] * len(rows)
    settings = generation_settings(model, decoding.max_new_tokens)
    lengths = [len(row) + decoding.max_new_tokens for row in rows]
    buckets = length_buckets(lengths, TOKEN_BUDGET)
    batches = [[rows[i] for i in bucket] for bucket in buckets]
    with seeded(decoding.seed, model.device):
        # drawing, each batch goes on from where the generator of the one before it stopped
        share = _continue_batches if decoding.do_sample else _shared_out
        found = share(model, batches, settings, decoding)
        for bucket, texts in zip(buckets, found, strict=True):
            for index, text in zip(bucket, texts, strict=True):
                answers[index] = text
    return answers


def _shared_out(model: EditableModel, batches: Sequence[list[list[int]]], *given: Any) -> Iterator[list[str]]:
    from nmke.models.ranks import shared_out  # which loads models, and so imports this file

    return shared_out(model, _continue_batches, batches, *given)


def _continue_batches(
    model: EditableModel,
    batches: Sequence[list[list[int]]],
    settings: GenerationConfig,
    decoding: Decoding,
) -> Iterator[list[str]]:
    for rows in batches:
        yield _continue_batch(model, rows, settings, decoding)


def _continue_batch(
    model: EditableModel, rows: list[list[int]], settings: GenerationConfig, decoding: Decoding
) -> list[str]:
    batch = pad_batch(rows, model.encoder.pad_id, "left", model.device)
    width = batch.input_ids.shape[1]

    def ended(ids: Tensor, _scores: Any, **_: Any) -> Tensor:
        texts = [_decode(model, row, settings) for row in ids[:, width:].tolist()]
        return torch.tensor([decoding.cut(text) != text for text in texts], device=ids.device)

    draws = LogitsProcessorList([DrawTopK(decoding.temperature)] if decoding.do_sample else [])
    with contiguous_input(model.model.get_output_embeddings()):
        output = model.model.generate(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            generation_config=settings,
            logits_processor=draws,
            stopping_criteria=[ended] if decoding.stops else None,
        )
    texts = [_decode(model, row, settings) for row in output[:, width:].tolist()]
    return [decoding.cut(text) for text in texts]


def _decode(model: EditableModel, ids: list[int], settings: GenerationConfig) -> str:
    """Text up to the first end-of-text token."""
    ends = settings.eos_token_id or ()
    length = next((i for i, token in enumerate(ids) if token in ends), len(ids))
    return str(
        model.tokenizer.decode(ids[:length], skip_special_tokens=True, clean_up_tokenization_spaces=False)
    )


def generation_settings(model: EditableModel, max_new_tokens: int) -> GenerationConfig:
    """Greedy decoding without the penalties and cut-offs that an instruct model's own settings may hold."""
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens is {max_new_tokens}; ask for at least 1 new token")
    own = model.model.generation_config.eos_token_id
    ends = own if isinstance(own, list) else [own, model.tokenizer.eos_token_id]
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        top_p=1.0,
        top_k=50,
        temperature=1.0,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        eos_token_id=sorted({token for token in ends if token is not None}) or None,
        pad_token_id=model.encoder.pad_id,
    )


def _check_lengths(model: EditableModel, rows: list[list[int]], max_new_tokens: int) -> None:
    longest, limit = max(map(len, rows), default=0), model.context_length
    if limit is not None and longest + max_new_tokens > limit:
        raise RequestError(
            f"a prompt of {longest} tokens and {max_new_tokens} new ones were asked for, but {model.name} "
            f"reads {limit} tokens; shorten the prompt or ask for fewer"
        )


@contextmanager
def seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """Draws inside are repeatable with a seed; torch's own generator is left as it was."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices, enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        yield


def first_line(text: str) -> str:
    """`text` before the first line break that follows something visible."""
    start = len(text) - len(text.lstrip())
    return text[:start] + text[start:].partition("\n")[0]
