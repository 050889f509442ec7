"""How much one request may ask for, and the errors that a request can meet; each has its own code."""

from __future__ import annotations

from dataclasses import dataclass

from nmke.errors import ConfigError, LayoutError, LedgerError, MemoryPlanError, NmkeError, RequestError


@dataclass(frozen=True)
class Limits:
    """Upper bounds.

    Args:
        body_bytes: Of a request's body.
        upload_bytes: Of a facts file.
        prompt_characters: Of one prompt, or of a whole conversation.
        new_tokens: Of one answer.
        facts: In one job.
        queued_jobs: That wait or are paused.
        waiting_answers: Requests that wait for the model.
        page: Entries in one answer of a list.
    """

    body_bytes: int = 2**20
    upload_bytes: int = 32 * 2**20
    prompt_characters: int = 20_000
    new_tokens: int = 1024
    facts: int = 100_000
    queued_jobs: int = 32
    waiting_answers: int = 32
    page: int = 500

    def check_prompt(self, text: str) -> None:
        """Raise if a prompt is too long.

        Raises:
            StudioError: "prompt_too_long".
        """
        if len(text) > self.prompt_characters:
            raise StudioError(
                413,
                "prompt_too_long",
                f"a prompt of {len(text):,} characters was sent, {self.prompt_characters:,} are read; shorten it",
            )

    def check_tokens(self, count: int) -> None:
        """Raise if an answer would be too long.

        Raises:
            StudioError: "too_many_tokens".
        """
        if count > self.new_tokens:
            raise StudioError(
                422,
                "too_many_tokens",
                f"{count:,} new tokens were asked for, at most {self.new_tokens:,} are written; ask for fewer",
            )


class StudioError(NmkeError):
    """A request that is refused.

    Args:
        status: HTTP status.
        code: Short name that programs can rely on.
        message: Three parts, as every error's.
    """

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code


def not_found(what: str, name: str, hint: str) -> StudioError:
    """The error for something that is not there."""
    return StudioError(404, "not_found", f"{what} {name[:80]!r} does not exist; {hint}")


_CODES: tuple[tuple[type[NmkeError], int, str], ...] = (
    (ConfigError, 422, "invalid_setting"),
    (RequestError, 422, "invalid_request"),
    (LayoutError, 422, "not_editable"),
    (MemoryPlanError, 507, "out_of_memory"),
    (LedgerError, 409, "run_conflict"),
)


def status_and_code(error: NmkeError) -> tuple[int, str]:
    """HTTP status and short name of an error."""
    if isinstance(error, StudioError):
        return error.status, error.code
    for kind, status, code in _CODES:
        if isinstance(error, kind):
            return status, code
    return 500, "failed"
