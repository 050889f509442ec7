"""Talk to a model: one answer to a conversation or behind a text, told piece by piece while it is written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.generation.streamers import BaseStreamer

from nmke.errors import RequestError
from nmke.models.generate import Decoding, DrawTopK, first_line, generation_settings, seeded
from nmke.models.load import EditableModel

Messages = Sequence[dict[str, str]]
Listener = Callable[[str], None]


@dataclass(frozen=True)
class Reply:
    """What a model answered.

    Args:
        text: The answer without surrounding spaces.
        prompt_tokens: Tokens that it was given.
        new_tokens: Tokens that it wrote, the one that ended it included.
        ended: Whether it came to an end of its own, not at the limit.
    """

    text: str
    prompt_tokens: int
    new_tokens: int
    ended: bool


def has_template(model: EditableModel) -> bool:
    """Whether the tokenizer knows how a conversation is written."""
    return bool(getattr(model.tokenizer, "chat_template", None))


def reply(
    model: EditableModel,
    turns: Messages,
    decoding: Decoding,
    *,
    raw: bool = False,
    tell: Listener | None = None,
) -> Reply:
    """The model's answer to the last turn.

    Args:
        model: The model as it is now.
        turns: The conversation, each turn with "role" and "content", the user's last.
        decoding: How to answer.
        raw: Continue the last turn's text without the chat template; models without one always do.
        tell: Called with all of the answer so far after every token; what it raises ends the answer.

    Raises:
        RequestError: If the conversation is empty or does not fit the model.
    """
    given = _ids(model, turns, raw or not has_template(model))
    limit = model.context_length
    if limit is not None and len(given) + decoding.max_new_tokens > limit:
        raise RequestError(
            f"the conversation has {len(given)} tokens and {decoding.max_new_tokens} new ones were asked for, "
            f"{model.name} reads {limit}; begin anew or ask for fewer"
        )
    settings = generation_settings(model, decoding.max_new_tokens)
    ids = torch.tensor([given], device=model.device)
    draws = LogitsProcessorList([DrawTopK(decoding.temperature)] if decoding.do_sample else [])
    more: dict[str, Any] = {} if tell is None else {"streamer": _Teller(model, tell)}
    with seeded(decoding.seed, model.device), torch.inference_mode():
        output = model.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            generation_config=settings,
            logits_processor=draws,
            **more,
        )
    new = output[0, len(given) :].tolist()
    text = _decode(model, new)
    text = first_line(text) if decoding.stop_at_newline else text
    return Reply(text.strip(), len(given), len(new), bool(new) and new[-1] in (settings.eos_token_id or ()))


def _ids(model: EditableModel, turns: Messages, raw: bool) -> list[int]:
    if not turns or not turns[-1]["content"].strip():
        raise RequestError("an empty message was sent; write what the model shall answer")
    if raw:
        return model.encoder.encode(turns[-1]["content"])
    try:
        text = model.tokenizer.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=True)
    except (
        Exception
    ) as error:  # a template is code of the model's: it may refuse roles or their order with any error
        raise RequestError(
            f"{model.name}'s chat template refuses the conversation ({error}); let user and assistant take turns"
        ) from error
    ids = model.tokenizer(text, add_special_tokens=False)["input_ids"]
    return [int(token) for token in ids]


def _decode(model: EditableModel, ids: list[int]) -> str:
    return str(model.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


class _Teller(BaseStreamer):
    """Decodes everything again at each token: pieces of a character become the character once it is whole."""

    def __init__(self, model: EditableModel, tell: Listener) -> None:
        self._model, self._tell = model, tell
        self._ids: list[int] = []
        self._prompt = True

    def put(self, value: Tensor) -> None:
        """Take the prompt first, then one token at a time."""
        if self._prompt:
            self._prompt = False
            return
        self._ids += value.flatten().tolist()
        self._tell(_decode(self._model, self._ids).lstrip().rstrip("\ufffd"))

    def end(self) -> None:
        """Nothing is left to say."""
