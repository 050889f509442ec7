"""The contract of an export format, and what every format does the same way: prompts to compare on, the final move."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from nmke.errors import ExportError, NumericsError
from nmke.evaluation.target_scores import predictions
from nmke.models.cache import atomic_directory
from nmke.models.load import EditableModel
from nmke.models.tokens import pad_batch
from nmke.registry import Registry
from nmke.session import EditSession
from nmke.types import EditRequest

CHECK_PROMPTS = ("The quick brown fox jumps over", "In 1969, the first people on the moon were")
MOST_CHECKED = 8
MOST_SCORED = 100  # edits scored again on what was written


@dataclass(frozen=True)
class ExportReport:
    """What an export wrote, and how it was checked.

    Args:
        format: Registered name.
        path: Folder or file.
        bytes: Size on disk.
        content_hash: Of the session that was exported.
        largest_difference: Largest absolute difference of logits between the export as loaded and the session.
        tolerance: The difference that was allowed.
        prompts: How many prompts were compared.
        load: The line that loads or serves it.
        notes: What else is worth knowing, one sentence each.
    """

    format: str
    path: Path
    bytes: int
    content_hash: str
    largest_difference: float
    tolerance: float
    prompts: int
    load: str
    notes: tuple[str, ...] = ()


class Exporter(Protocol):
    """Writes the session's model to `path`, loads it back and compares."""

    def __call__(self, session: EditSession, path: Path, *, force: bool = False) -> ExportReport:
        """Write and check.

        Raises:
            ExportError: If it cannot be written, or does not reproduce the session's logits.
            NumericsError: If a weight is not finite.
        """
        ...


exporters: Registry[Exporter] = Registry("export format")


def check_prompts(session: EditSession) -> list[str]:
    """Prompts to compare on: some of the edited ones, and two that have nothing to do with them."""
    edited = [request.text for request in session.active_requests()]
    step = max(1, len(edited) // MOST_CHECKED)
    return [*edited[::step][:MOST_CHECKED], *CHECK_PROMPTS]


@torch.inference_mode()
def last_logits(model: EditableModel, prompts: Sequence[str]) -> list[Float[Tensor, "seq d_vocab"]]:
    """Logits at every token of each prompt, float32 on the CPU; prompts are run one by one."""
    found = []
    for prompt in prompts:
        batch = pad_batch([model.encoder.encode(prompt)], model.encoder.pad_id, device=model.device)
        found.append(model.model(**model.inputs(batch)).logits[0].float().cpu())
    return found


def largest_difference(first: EditableModel, second: EditableModel, prompts: Sequence[str]) -> float:
    """Largest absolute difference of the two models' logits over all prompts and tokens."""
    pairs = zip(last_logits(first, prompts), last_logits(second, prompts), strict=True)
    return max(float((a - b).abs().max()) for a, b in pairs)


def answered(model: EditableModel, requests: Sequence[EditRequest]) -> set[str]:
    """Ids of the edits whose new answer the model gives, token by token."""
    scores = predictions(model, [(request.text, request.target_new) for request in requests])
    return {request.id for request, score in zip(requests, scores, strict=True) if score.accuracy == 1.0}


@dataclass(frozen=True)
class Answers:
    """The newest edits (100 at most), and which of them a session's model answers."""

    requests: list[EditRequest]
    given: set[str]

    @classmethod
    def by(cls, session: EditSession) -> Answers:
        """Score the session's model as it is now."""
        requests = session.active_requests()[-MOST_SCORED:]
        return cls(requests, answered(session.model, requests) if requests else set())

    def rescored(self, reloaded: EditableModel) -> tuple[str, ...]:
        """Score the same edits on an export as loaded back.

        Returns:
            A sentence with the counts; nothing when the run holds no edit.

        Raises:
            ExportError: If an edit that the session's model answers is not answered by the export.
        """
        if not self.requests:
            return ()
        lost = sorted(self.given - answered(reloaded, self.requests))
        if lost:
            raise ExportError(
                f"{len(lost)} of {len(self.given)} edits (first: {lost[0]!r}) are lost in the export as loaded back; "
                "nothing was exported: run `nmke verify`, then try again"
            )
        return (
            f"{len(self.given)} of the {len(self.requests)} newest edits are answered, as by the session's model",
        )


def check_exportable(session: EditSession) -> None:
    """Refuse weights that are not finite, and edits that are not in the weights.

    Raises:
        NumericsError: Names the tensor.
        ExportError: If the run holds a side memory that inference looks things up in.
    """
    if session.weights.side.recalled:
        raise ExportError(
            f"the run's edits are in a side memory of {session.weights.side.recalled[0]!r}, which no export format "
            "holds; nothing was exported: use the run folder itself, or edit with a method that writes weights"
        )
    for name, tensor in session.model.model.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise NumericsError(
                f"tensor {name!r} holds NaN or infinity; nothing was exported: take edits back with `nmke undo`"
            )


@contextmanager
def new_folder(path: Path, *, force: bool) -> Iterator[Path]:
    """A temporary folder that becomes `path` when the block ends without an error.

    Raises:
        ExportError: If something stands at `path` and `force` is False, or it cannot be written.
    """
    taken = path.exists() and (not path.is_dir() or any(path.iterdir()))
    if taken and not force:
        raise ExportError(f"output {str(path)!r} exists; replace it with --force or choose another")
    if taken and (not path.is_dir() or not _is_export(path)):
        raise ExportError(f"output {str(path)!r} is no exported model, so it is not replaced; choose another")
    try:
        with atomic_directory(path, replace=True) as building:
            yield building
    except OSError as error:
        raise ExportError(
            f"export to {str(path)!r} failed ({error}); nothing is left there: free disk space and try again"
        ) from error


def folder_bytes(path: Path) -> int:
    """Size of everything in a folder."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def _is_export(path: Path) -> bool:
    return (path / "nmke-export.json").is_file()
