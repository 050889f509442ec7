"""Everything that turns text into token ids and ids into batches, decided here and only here.

Special tokens: whatever the tokenizer itself puts in front of a text (a BOS, or nothing) is kept; what it
puts behind (an EOS) is dropped, because a prompt is there to be continued.
Axes: `batch seq`.
"""

import inspect
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from nmke.errors import RequestError

PaddingSide = Literal["right", "left"]
WRITTEN_WITHOUT_SPACES = ("CJK", "HIRAGANA", "KATAKANA", "IDEOGRAPHIC", "FULLWIDTH")


class TextEncoder:
    """Text to token ids, with one rule for special tokens, spaces and offsets.

    Args:
        tokenizer: A transformers tokenizer; its settings are read, never changed.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.prefix_ids = self._find_prefix()

    @property
    def adds_bos(self) -> bool:
        """Whether the tokenizer puts special tokens in front of a text."""
        return bool(self.prefix_ids)

    @property
    def pad_id(self) -> int:
        """Id that fills up batches: the pad token, else the end of text, else 0."""
        for token_id in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id):
            if token_id is not None:
                return int(token_id)
        return 0

    def encode(self, text: str) -> list[int]:
        """Ids of a prompt: the tokenizer's own prefix, then the text without its trailing whitespace.

        Raises:
            RequestError: If nothing is left to read.
        """
        ids = self._with_prefix(self._plain(text.rstrip()))
        if not ids:
            raise RequestError(f"prompt {text[:120]!r} holds no text; give at least one word")
        return ids

    def encode_target(self, text: str, target: str) -> list[int]:
        """Ids of `target` as the continuation of `text`, so that prompt and target join without a seam.

        The whitespace that `encode` strips from the prompt opens the target instead; where the prompt has
        none, one space does, except before whitespace and before scripts written without spaces.

        Raises:
            RequestError: If the target is empty or the tokenizer knows nothing of it.
        """
        tail = _joining_space(text, target) + target.rstrip()
        anchors = (text.rstrip(), "x")
        found = (self._continuation(anchor, tail) for anchor in anchors if anchor)
        ids = next((ids for ids in found if ids), None) or self._plain(tail)
        if not target.strip() or not ids:
            raise RequestError(
                f"target {target[:120]!r} after prompt {text[:120]!r} gives no token; name a visible answer"
            )
        return ids

    def subject_last_index(self, text: str, end_char: int) -> int:
        """Index in `encode(text)` of the last token that holds part of the subject.

        Args:
            text: The whole prompt.
            end_char: Offset in characters just behind the subject.

        Raises:
            RequestError: If the tokenizer maps the subject's last character to no token.
        """
        ((_, index),) = self._placed([(text, end_char)])
        return index

    def encode_heads(self, prompts: Sequence[tuple[str, int]]) -> list[list[int]]:
        """For many prompts at once, `encode(text)` up to the last token that holds part of the subject.

        Args:
            prompts: As for `subject_last_index`.

        Raises:
            RequestError: As `subject_last_index`.
        """
        return [ids[: index + 1] for ids, index in self._placed(prompts)]

    def _placed(self, prompts: Sequence[tuple[str, int]]) -> list[tuple[list[int], int]]:
        """Ids of each prompt, and the index of the last one that holds part of the subject."""
        texts = [text.rstrip() for text, _ in prompts]
        ends = [len(text[:end].rstrip()) for text, (_, end) in zip(texts, prompts, strict=True)]
        if getattr(self.tokenizer, "is_fast", False):
            read = self.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
            plain = read["input_ids"]
            places = map(_last_overlap, read["offset_mapping"], ends)
        else:
            plain = [self._plain(text) for text in texts]
            places = map(self._last_needed, texts, ends)
        found = []
        for ids, index, end, (text, end_char) in zip(plain, places, ends, prompts, strict=True):
            if end == 0 or index is None:
                raise RequestError(
                    f"the subject that ends at character {end_char} of prompt {text.rstrip()[:120]!r} gives no token; "
                    "spell it with characters that the model's tokenizer knows"
                )
            whole = self._with_prefix(list(ids))
            found.append((whole, len(whole) - len(ids) + index))
        return found

    def _plain(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _find_prefix(self) -> list[int]:
        plain = self._plain("a")
        full = list(self.tokenizer("a", add_special_tokens=True)["input_ids"])
        starts = range(len(full) - len(plain) + 1)
        start = next((i for i in starts if full[i : i + len(plain)] == plain), 0)
        return full[:start]

    def _with_prefix(self, plain: list[int]) -> list[int]:
        """Put the prefix in front, unless the text spells it out itself (as a chat template does)."""
        already = plain[: len(self.prefix_ids)] == self.prefix_ids
        return plain if already else self.prefix_ids + plain

    def _continuation(self, anchor: str, tail: str) -> list[int] | None:
        """What `tail` adds to the ids of `anchor`, or None when joining them changes the anchor's ids."""
        before = self._plain(anchor)
        both = self._plain(anchor + tail)
        return both[len(before) :] if both[: len(before)] == before else None

    def _last_needed(self, text: str, end: int) -> int | None:
        """For tokenizers without offsets: the token with which the subject's last character is complete."""
        ids, head = self._plain(text), self._plain(text[:end])
        if head == self._plain(text[: end - 1]):
            return None
        if head and ids[: len(head)] == head:
            return len(head) - 1
        wanted = _visible_length(text[:end])
        for count in range(1, len(ids) + 1):
            shown = self.tokenizer.decode(ids[:count], clean_up_tokenization_spaces=False)
            if _visible_length(shown.rstrip("\ufffd")) >= wanted:
                return count - 1
        return None


def _last_overlap(offsets: Sequence[tuple[int, int]], end: int) -> int | None:
    spans = [(i, stop) for i, (start, stop) in enumerate(offsets) if start < min(stop, end)]
    return spans[-1][0] if spans and spans[-1][1] >= end else None


def _joining_space(text: str, target: str) -> str:
    stripped = text[len(text.rstrip()) :]
    if not text.strip() or target[:1].isspace():
        return ""
    if stripped:
        return stripped
    return "" if unicodedata.name(target[:1] or " ", "").startswith(WRITTEN_WITHOUT_SPACES) else " "


def _visible_length(text: str) -> int:
    return sum(not character.isspace() for character in text)


@dataclass(frozen=True)
class TokenBatch:
    """Rows of token ids of unequal length in one rectangle.

    Args:
        input_ids: Token ids, padded.
        attention_mask: 1 for real tokens, 0 for padding.
        position_ids: Count of real tokens before each one, from 0; 0 for padding.
        padding_side: Where the padding is.
    """

    input_ids: Int[Tensor, "batch seq"]
    attention_mask: Int[Tensor, "batch seq"]
    position_ids: Int[Tensor, "batch seq"]
    padding_side: PaddingSide

    @property
    def lengths(self) -> Int[Tensor, " batch"]:
        """Number of real tokens per row."""
        return self.attention_mask.sum(dim=1)

    @property
    def last_index(self) -> Int[Tensor, " batch"]:
        """Column of each row's last real token."""
        width = self.input_ids.shape[1]
        return torch.full_like(self.lengths, width - 1) if self.padding_side == "left" else self.lengths - 1

    def column(self, row: int, index: int) -> int:
        """Column of the `index`-th real token of `row`, counted from 0."""
        skipped = self.input_ids.shape[1] - int(self.lengths[row]) if self.padding_side == "left" else 0
        return skipped + index

    @property
    def model_inputs(self) -> dict[str, Tensor]:
        """Keyword arguments of the model's forward."""
        return {
            "input_ids": self.input_ids,
            "attention_mask": self.attention_mask,
            "position_ids": self.position_ids,
        }

    def inputs_for(self, model: torch.nn.Module) -> dict[str, Tensor]:
        """The keyword arguments that this model's forward takes: some count positions themselves."""
        named = self.model_inputs
        if "position_ids" not in inspect.signature(model.forward).parameters:
            del named["position_ids"]
        return named


def pad_batch(
    rows: Sequence[Sequence[int]],
    pad_id: int,
    side: PaddingSide = "right",
    device: torch.device | str = "cpu",
) -> TokenBatch:
    """Pad rows of ids to the longest one.

    Args:
        rows: Token ids; a row may be empty (all padding) as long as one is not.
        pad_id: Id written into the padding.
        side: Where to pad: left to generate, right for everything else.
        device: Where the tensors are made.

    Raises:
        RequestError: If there are no rows, or all of them are empty.
    """
    if not any(rows):
        raise RequestError(f"a batch of {len(rows)} rows holds no token; give at least one row a token")
    width = max(map(len, rows))
    fill = [width - len(row) for row in rows]
    right = side == "right"
    ids = [
        [*row, *[pad_id] * n] if right else [*[pad_id] * n, *row] for row, n in zip(rows, fill, strict=True)
    ]
    mask = [[1] * (width - n) + [0] * n if right else [0] * n + [1] * (width - n) for n in fill]
    attention_mask = torch.tensor(mask, device=device)
    position_ids = (attention_mask.cumsum(dim=1) - 1).clamp(min=0) * attention_mask
    return TokenBatch(torch.tensor(ids, device=device), attention_mask, position_ids, side)


def length_buckets(lengths: Sequence[int], token_budget: int) -> list[list[int]]:
    """Group rows of similar length so that each group, padded, fits a budget.

    Args:
        lengths: Tokens per row.
        token_budget: Largest rows x longest row of a group; a longer row gets a group of its own.

    Returns:
        Indices into `lengths`, shortest rows first, each index once.
    """
    buckets: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if buckets and (len(buckets[-1]) + 1) * lengths[index] <= token_budget:
            buckets[-1].append(index)
        else:
            buckets.append([index])
    return buckets
