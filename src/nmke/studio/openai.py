"""Chat completions in the shape that OpenAI's clients speak; the model is "edited" or "base".

Source: the public description of `POST /v1/chat/completions`. Differs: one choice, greedy unless a temperature is
given, and fields that are not known are ignored, as clients send many.
"""

from __future__ import annotations

import time
import uuid
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from nmke.models.chat import Reply
from nmke.models.generate import Decoding
from nmke.studio.limits import StudioError

DEFAULT_TOKENS = 256


class Part(BaseModel):
    """A piece of a message."""

    type: Literal["text"]
    text: str


class Turn(BaseModel):
    """One message."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]

    def plain(self) -> dict[str, str]:
        """As chat templates take it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class CompletionIn(BaseModel):
    """A conversation to go on with."""

    model_config = ConfigDict(extra="ignore")

    model: str = Field("edited", description="'edited' or 'base'.")
    messages: list[Turn] = Field(min_length=1, max_length=1000)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2, description="Greedy when 0 or not given.")
    seed: int | None = Field(None, ge=0, le=2**63 - 1)
    n: int | None = Field(None, ge=1, le=1)
    stream: bool | None = None

    def which(self) -> Literal["edited", "base"]:
        """The model that is asked.

        Raises:
            StudioError: "model_not_found".
        """
        if self.model == "base":
            return "base"
        if self.model == "edited":
            return "edited"
        raise StudioError(
            404, "model_not_found", f"model {self.model[:80]!r} does not exist; ask 'edited' or 'base'"
        )

    def decoding(self) -> Decoding:
        """How to answer."""
        tokens = self.max_completion_tokens or self.max_tokens or DEFAULT_TOKENS
        draw = bool(self.temperature)
        return Decoding(tokens, draw, (self.seed or 0) if draw else None, self.temperature or 1.0)


class Message(BaseModel):
    """What the model said."""

    role: Literal["assistant"] = "assistant"
    content: str


class Choice(BaseModel):
    """The one answer."""

    index: int = 0
    message: Message
    finish_reason: Literal["stop", "length"]


class Usage(BaseModel):
    """Tokens read and written."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionOut(BaseModel):
    """An answer."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage


class ModelOut(BaseModel):
    """A model that can be asked."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    content_hash: str


class ModelsOut(BaseModel):
    """The models that can be asked."""

    object: Literal["list"] = "list"
    data: list[ModelOut]


def new_id() -> str:
    """Name of an answer."""
    return f"chatcmpl-{uuid.uuid4().hex}"


def completion(asked: CompletionIn, reply: Reply) -> CompletionOut:
    """The whole answer."""
    return CompletionOut(
        id=new_id(),
        created=int(time.time()),
        model=asked.model,
        choices=[Choice(message=Message(content=reply.text), finish_reason=_why(reply))],
        usage=Usage(
            prompt_tokens=reply.prompt_tokens,
            completion_tokens=reply.new_tokens,
            total_tokens=reply.prompt_tokens + reply.new_tokens,
        ),
    )


def chunk(
    name: str, asked: CompletionIn, delta: dict[str, str], reply: Reply | None = None
) -> dict[str, Any]:
    """A piece of a streamed answer; the last one has the reply."""
    choice = {"index": 0, "delta": delta, "finish_reason": None if reply is None else _why(reply)}
    return {
        "id": name,
        "object": "chat.completion.chunk",
        "created": int(time.time()),
        "model": asked.model,
        "choices": [choice],
    }


def _why(reply: Reply) -> Literal["stop", "length"]:
    return "stop" if reply.ended else "length"
