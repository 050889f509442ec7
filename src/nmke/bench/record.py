"""The record of one benchmark cell: one method on one stream of facts with one seed, at its checkpoints.

One JSON file per cell, schema `nmke.bench_cell/1`; the table, the comparison and the report read it and none
computes again what it holds. Scores carry their protocol's version, n and a 95 % interval, and the value of every
fact in the stream's order, so that two cells on the same facts can be compared pair by pair.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from nmke.errors import RequestError
from nmke.models.cache import atomic_file

SCHEMA: Final = "nmke.bench_cell/1"
CELLS = "cells"
Status = Literal["running", "done", "collapsed", "failed"]
Time = Literal["after_batch", "after_last"]


def _finite_or_none(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


# A number that may be missing; NaN and infinity, which JSON lacks, are kept as null.
Measured = Annotated[float | None, BeforeValidator(_finite_or_none)]


class _Record(BaseModel):
    """Closed and frozen, as every part of a record."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelIdentity(_Record):
    """The unedited model."""

    source: str = Field(description="Built-in name, folder or hub id, as it was asked for.")
    name: str = Field(description="Short name.")
    fingerprint: str = Field(description="sha256 of its weights.")
    dtype: str = Field(description='Type its weights are loaded in, such as "float32".')
    device: str = Field(description='Where it ran, such as "cpu" or "cuda:0".')


class StreamIdentity(_Record):
    """Which facts were edited, in which order."""

    dataset: str = Field(description='Name of the data set, such as "counterfact".')
    file_sha256: str = Field(description="sha256 of the file the facts came from.")
    start: int = Field(description="First record of the pool, counted from 0 in the file.")
    stop: int | None = Field(description="First record behind the pool; None: to the end of the file.")
    order: Literal["file", "shuffled"] = Field(
        description="As in the file, or drawn from the pool by the seed."
    )
    complete: bool = Field(description="Whether only facts with a paraphrase and a neighbour were taken.")
    derived: bool = Field(description="Whether derived prompts, not the data set's own, were scored too.")
    facts_hash: str = Field(description="sha256 over every field of the facts, in their order.")
    ids: tuple[str, ...] = Field(
        description="Ids of the facts in the order of editing; `per_fact` follows it."
    )


class CellIdentity(_Record):
    """Everything that decides a cell's numbers."""

    id: str = Field(
        description="Name of the cell's file, without ending; two cells that differ have two ids."
    )
    label: str = Field(description='The method as the plan names it, such as "nmke[mask=random]".')
    method: str = Field(description='Registered method, or "unedited" for the model left alone.')
    source: str = Field(description="Where the method comes from.")
    variant: dict[str, Any] = Field(description="Settings that the label changes from the method's own.")
    settings: dict[str, Any] = Field(description="Every setting, resolved; {} for the unedited model.")
    model: ModelIdentity
    stream: StreamIdentity
    batch_size: int = Field(description="Edits solved together; a method with a limit has its limit here.")
    seed: int = Field(description="Of contexts, random masks, self-written corpus and the stream's order.")
    checkpoints: tuple[int, ...] = Field(description="Numbers of edits asked for; see `Checkpoint.n_edits`.")
    protocols: dict[str, str] = Field(description='Version of each protocol, such as "teacher_forced/1".')


class Score(_Record):
    """One metric over the facts edited so far."""

    value: float = Field(description="Mean over facts (a fact's value is the mean over its prompts).")
    low: float = Field(description="2.5th percentile of the bootstrap over facts.")
    high: float = Field(description="97.5th percentile.")
    n: int = Field(description="Facts that have a value.")
    prompts: int | None = Field(
        default=None, description="Prompts behind them; None for a score made of others."
    )
    per_fact: tuple[float | None, ...] | None = Field(
        default=None,
        description="Value of each fact, in the order of `stream.ids` up to `n_edits`; None where it has no such "
        "prompt. None as a whole for a score that no fact has by itself (the harmonic mean).",
    )


class ProtocolRecord(_Record):
    """Scores under one protocol."""

    version: str = Field(description='Name and version, such as "teacher_forced/1".')
    metrics: dict[str, Score | None] = Field(description="By name; None where no fact has such a prompt.")
    settings: dict[str, int] = Field(default_factory=dict, description="Numbers that belong to the protocol.")


class HeldOut(_Record):
    """Perplexity and KL on held-out text, edited against unedited."""

    text: str = Field(description='What text: "wikitext2-test" or the built-in sentences ("nmke-heldout").')
    sha256: str = Field(description="Of the text that was read.")
    tokens: int = Field(description="Tokens whose loss is averaged.")
    perplexity: Measured = Field(description="Of the edited model; null when it is not finite.")
    perplexity_base: float = Field(description="Of the unedited model, on the same tokens.")
    kl: Measured = Field(description="Mean KL(unedited ‖ edited) of the next token, nats.")
    kl_positions: int = Field(description="Tokens at which the KL was taken, evenly spread.")


class TaskScore(_Record):
    """One task of general ability."""

    metric: str = Field(description='Such as "acc" or "exact_match".')
    value: float
    low: float = Field(description="Lower end of the 95 % interval.")
    high: float = Field(description="Upper end.")
    n: int = Field(description="Questions asked.")
    version: str = Field(default="", description="Name and version of prompt and scoring.")
    base: float | None = Field(default=None, description="The unedited model's, on the same questions.")
    change: tuple[float, float, float] | None = Field(
        default=None,
        description="Mean change over the questions and its paired 95 % interval: mean, low, high.",
    )


class Cost(_Record):
    """What the edits up to a checkpoint took; measuring is not counted."""

    seconds_per_edit: float | None = Field(description="Wall clock; None when nothing was edited.")
    cpu_seconds_per_edit: float | None = Field(description="CPU time of the process, fairer under load.")
    stages: dict[str, float] = Field(description="Wall-clock seconds of each stage, over all edits so far.")
    load_average: tuple[float, float] = Field(description="Lowest and highest 1-minute load between edits.")
    peak_memory_mb: float = Field(description="Largest memory since the cell was begun or resumed.")
    memory_of: Literal["process", "device"] = Field(description="Resident memory, or the device's allocator.")


class Checkpoint(_Record):
    """The model after some edits.

    Marks are met at the end of a batch: `n_edits` is the number of facts given so far, the first batch end at
    or after the mark.
    """

    n_edits: int = Field(description="Facts of the stream given so far.")
    n_written: int = Field(description="Of these, facts the model said right after its batch.")
    n_known: int = Field(description="Facts it said before, so that nothing was written for them.")
    n_failed: int = Field(description="Facts written that it did not say.")
    after_batch: dict[str, ProtocolRecord] = Field(
        description="By protocol: every fact so far, as scored right after its own batch."
    )
    after_last: dict[str, ProtocolRecord] = Field(
        description="By protocol: every fact so far, scored now, after the last edit (retention)."
    )
    held_out: HeldOut
    tasks: dict[str, TaskScore] = Field(default_factory=dict, description="General ability, if asked for.")
    drift: dict[int, float] = Field(description="‖W - W_base‖ / ‖W_base‖ of each edited layer.")
    neurons_kept: float | None = Field(
        description="Mean share of neurons that an edit may write, over layers and batches; None without masks."
    )
    cost: Cost
    content_hash: str = Field(description="Of the edited model.")

    def scores(self, time: Time) -> Mapping[str, ProtocolRecord]:
        """The scores of one of the two times, by protocol."""
        return self.after_batch if time == "after_batch" else self.after_last


class CellRecord(_Record):
    """One cell of a benchmark."""

    schema_: Literal["nmke.bench_cell/1"] = Field(default=SCHEMA, alias="schema")
    identity: CellIdentity
    status: Status = Field(
        description="running: not finished yet; done; collapsed: the model's health crossed a stop limit; "
        "failed: see `reason`."
    )
    reason: str | None = Field(default=None, description="Why it collapsed or failed, one sentence.")
    created: str = Field(description="UTC time of the beginning.")
    updated: str = Field(description="UTC time of the last change.")
    machine: dict[str, Any] = Field(description="Processor, cores, threads, accelerator.")
    versions: dict[str, str] = Field(description="nmke, torch, transformers, python.")
    checkpoints: tuple[Checkpoint, ...] = Field(default=(), description="In ascending number of edits.")

    @property
    def last(self) -> Checkpoint | None:
        """The newest checkpoint, None before the first."""
        return self.checkpoints[-1] if self.checkpoints else None

    def at(self, n_edits: int) -> Checkpoint | None:
        """The checkpoint with exactly so many edits."""
        return next((point for point in self.checkpoints if point.n_edits == n_edits), None)

    def save(self, path: Path) -> None:
        """Write the record whole or not at all."""
        with atomic_file(path) as temporary:
            temporary.write_text(self.model_dump_json(by_alias=True, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> CellRecord:
        """Read what `save` wrote.

        Raises:
            RequestError: If the file is missing, damaged or of another schema; names the field.
        """
        try:
            return cls.model_validate_json(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise RequestError(
                f"cell record {str(path)!r} cannot be read ({error}); name a folder that `nmke bench run` made"
            ) from error
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "the file"
            raise RequestError(
                f"cell record {str(path)!r} is no {SCHEMA}: {where}: {first['msg'].lower()}; "
                "remove the file to run the cell again"
            ) from error


def read_cells(folder: Path) -> list[CellRecord]:
    """Every cell of a benchmark folder, by file name.

    Args:
        folder: What `nmke bench run -o` made, or a folder of cell files.

    Raises:
        RequestError: If there is none, or one is damaged.
    """
    records = [CellRecord.load(path) for path in _cell_files(folder)]
    if not records:
        raise RequestError(
            f"{str(folder)!r} holds no benchmark cell; make some with `nmke bench run -o {folder} ...`"
        )
    return records


def _cell_files(folder: Path) -> Iterator[Path]:
    inside = folder / CELLS
    yield from sorted((inside if inside.is_dir() else folder).glob("*.json"))
