"""What the API takes and gives, for FastAPI to check and for the OpenAPI schema to say."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from nmke.facts import parse_prompt
from nmke.studio.jobs import Kind, State
from nmke.types import EditRequest, Neighbor

Text = Annotated[str, Field(min_length=1)]
Settings = Annotated[
    dict[str, Any],
    Field(
        description="Settings to change for these edits: any field of the edit configuration but `corpus`."
    ),
]


class Strict(BaseModel):
    """Refuses fields that it does not know."""

    model_config = ConfigDict(extra="forbid")


class NeighborIn(Strict):
    """A prompt whose answer must not change."""

    prompt: Text
    answer: str | None = None


class FactIn(Strict):
    """One fact to write."""

    prompt: Text = Field(description="'The capital of {France} is', or plain text with `subject` in it.")
    target_new: Text = Field(description="The new answer.")
    subject: str | None = Field(None, description="The subject, where the prompt does not mark it.")
    id: str | None = Field(
        None, pattern=r"^[^/\\\x00-\x1f\x7f.][^/\\\x00-\x1f\x7f]{0,99}$", description="Own name."
    )
    target_true: str | None = None
    paraphrases: list[Text] = Field(default_factory=list, max_length=50)
    neighborhood: list[NeighborIn] = Field(default_factory=list, max_length=50)

    def request(self) -> EditRequest:
        """The request that the session takes.

        Raises:
            RequestError: If the subject is not in the prompt.
        """
        template, subject = parse_prompt(self.prompt, self.subject)
        return EditRequest(
            template,
            subject,
            self.target_new,
            id=self.id or "",
            target_true=self.target_true,
            paraphrases=tuple(self.paraphrases),
            neighborhood=tuple(Neighbor(n.prompt, n.answer) for n in self.neighborhood),
        )


class EditsIn(Strict):
    """Facts to edit, in one job."""

    edits: list[FactIn] = Field(min_length=1)
    settings: Settings = Field(default_factory=dict)
    resume: bool = Field(False, description="Skip facts that the run holds instead of refusing them.")
    watch: bool = Field(False, description="Ask the facts' prompts before and after.")


class UndoIn(Strict):
    """How much to take back."""

    batches: int = Field(1, ge=1, le=1_000_000)


class RetryIn(Strict):
    """How to try again."""

    settings: Settings = Field(default_factory=dict)


class ExportIn(Strict):
    """What to export."""

    format: Literal["hf", "delta", "lora", "gguf"] = "hf"
    name: str = Field("model", pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]{0,63}$")
    force: bool = Field(False, description="Replace an earlier export of that name.")


class PrepareIn(Strict):
    """Which key statistics to gather."""

    settings: Settings = Field(default_factory=dict)


class GenerateIn(Strict):
    """A text to continue."""

    prompt: Text
    model: Literal["edited", "base"] = "edited"
    max_new_tokens: int = Field(64, ge=1)
    temperature: float = Field(0.0, ge=0, le=10, description="0 takes the likeliest token.")
    seed: int = Field(0, ge=0, le=2**63 - 1)
    stop_at_newline: bool = False


class GenerateOut(BaseModel):
    """How the text goes on."""

    text: str
    model: str
    prompt_tokens: int
    new_tokens: int
    ended: bool


class TaskOut(BaseModel):
    """A task that runs."""

    title: str
    total: float
    done: float
    note: str


class ProgressOut(BaseModel):
    """What a job does now."""

    tasks: list[TaskOut] = Field(description="Outermost first.")
    curve: list[float] = Field(description="Mean probability of the batch's answers after each step.")


class JobOut(BaseModel):
    """A job."""

    id: str
    kind: Kind
    state: State
    summary: str
    created: str
    started: str | None
    finished: str | None
    wish: str | None = Field(description="'cancel' or 'pause', if asked for and not yet done.")
    progress: ProgressOut
    result: dict[str, Any] | None
    error: dict[str, str] | None


class EditOut(BaseModel):
    """An edit in the record."""

    id: str
    batch: str
    created: str
    status: Literal["written", "failed", "known"]
    active: bool = Field(description="False once it was taken back.")
    prompt: str
    subject: str
    target_new: str
    target_true: str | None
    paraphrases: list[str]
    neighborhood: list[NeighborIn]
    detail: dict[str, Any]


class EditsOut(BaseModel):
    """A page of edits, newest first."""

    edits: list[EditOut]
    next: str | None = Field(description="Give it as `before` to get the next page; null at the end.")


class HealthOut(BaseModel):
    """That the studio is ready, and where the run stands."""

    status: Literal["ok"]
    model: str
    run: str
    content_hash: str
    batches: int
    edits: int
    failed: int
    jobs: dict[str, int] = Field(description="How many are in each state.")
    waiting: int = Field(description="Requests that wait for the model.")


class Problem(BaseModel):
    """Why a request was refused."""

    code: str
    message: str
    details: list[dict[str, Any]] = Field(default_factory=list)


class ProblemOut(BaseModel):
    """An error."""

    error: Problem
