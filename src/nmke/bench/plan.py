"""What a benchmark runs: methods times streams times batch sizes times seeds, each product one cell."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError

from nmke.bench.labels import UNEDITED, Variant, parse_label
from nmke.config import EditConfig, explain, parse_layers, read_config
from nmke.editors import methods
from nmke.editors.method import with_defaults
from nmke.errors import ConfigError, unknown_name
from nmke.evaluation.ability import ability_tasks
from nmke.evaluation.protocols import PROTOCOLS

_SPAN = re.compile(r"\s*(\d*)\s*:\s*(\d*)\s*")
# The plan's own axes, which settings must not set a second time.
_AXES = ("method", "batch_size", "seed")
CUT_UP = ("token_budget",)  # settings that move numbers by rounding alone: cells may differ in them


class Plan(BaseModel):
    """A benchmark, as a YAML file or the flags of `nmke bench run` give it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field(description="Model: built-in name, folder, GGUF file or hub id.")
    methods: tuple[str, ...] = Field(
        min_length=1, description="Methods, each with settings if wanted: 'nmke[mask=random]'; or 'unedited'."
    )
    data: tuple[str, ...] = Field(("counterfact",), min_length=1, description="Data sets or facts files.")
    records: str = Field("0:", description="Pool of records in the file, START:STOP, counted from 0.")
    edits: PositiveInt | None = Field(None, description="Facts of a stream; None: all of the pool.")
    order: Literal["shuffled", "file"] = Field(
        "shuffled", description="Facts drawn from the pool by the seed, or taken as they stand in the file."
    )
    complete: bool = Field(True, description="Take only facts with a paraphrase and a neighbour.")
    derived: bool = Field(False, description="Score derived prompts too, which are not the data set's own.")
    batch_sizes: tuple[PositiveInt, ...] = Field((10,), min_length=1, description="Edits solved together.")
    seeds: tuple[int, ...] = Field((0,), min_length=1, description="Of streams, contexts and random masks.")
    checkpoints: tuple[PositiveInt, ...] = Field(
        (), description="Numbers of edits at which all is measured; the end always is."
    )
    protocols: tuple[str, ...] = Field(("teacher_forced", "likelihood"), description="Scoring protocols.")
    held_out_tokens: PositiveInt = Field(4096, description="Tokens of held-out text for perplexity and KL.")
    tasks: tuple[str, ...] = Field(
        (), description="Tasks of general ability at every checkpoint, such as 'mmlu'; none unless asked for."
    )
    task_limit: PositiveInt | None = Field(
        None, description="Questions of a task, drawn at random; None: all."
    )
    settings: dict[str, Any] = Field(default_factory=dict, description="Settings of every method.")
    dtype: str = Field("float32", description="Type of the weights.")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1.")

    @classmethod
    def create(cls, **given: Any) -> Plan:
        """A plan from its fields; `None` values are left at their default.

        Raises:
            ConfigError: If a field is unknown (the nearest is named), missing or out of range.
        """
        try:
            plan = cls(**{name: value for name, value in given.items() if value is not None})
        except ValidationError as error:
            raise ConfigError(f"plan: {explain(error, cls)}") from error
        for protocol in plan.protocols:
            if protocol not in PROTOCOLS:
                raise ConfigError(unknown_name("protocol", protocol, PROTOCOLS))
        for task in plan.tasks:
            ability_tasks.get(task)
        plan.cells()
        parse_span(plan.records)
        return plan

    @classmethod
    def read(cls, path: Path, **flags: Any) -> Plan:
        """A plan from a YAML file, with flags that win over it."""
        given = {name: value for name, value in flags.items() if value is not None}
        return cls.create(**{**read_config(path), **given})

    def save(self, path: Path) -> None:
        """Write the plan as YAML, every field."""
        content = yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
        path.write_text(content, encoding="utf-8")

    @property
    def pool(self) -> tuple[int, int | None]:
        """First record of the pool, and the first behind it (None: to the end of the file)."""
        return parse_span(self.records)

    def cells(self) -> list[Cell]:
        """Every cell, each once; those that are compared with one another stand together.

        A method that takes smaller batches only is run with its largest.

        Raises:
            ConfigError: If a method or setting is unknown, or one does not go with another.
        """
        variants = [parse_label(text, methods.names()) for text in self.methods]
        found: dict[str, Cell] = {}
        for dataset, size, seed, variant in product(self.data, self.batch_sizes, self.seeds, variants):
            cell = self._cell(variant, dataset, size, seed)
            found.setdefault(cell.id, cell)
        return list(found.values())

    def _cell(self, variant: Variant, dataset: str, batch_size: int, seed: int) -> Cell:
        _refuse_axes(self.settings, "the plan's settings")
        _refuse_axes(variant.settings, f"method {variant.label!r}")
        if variant.method == UNEDITED:
            return Cell(self, variant, dataset, EditConfig.create(batch_size=batch_size, seed=seed))
        largest = methods.get(variant.method).max_batch
        size = batch_size if largest is None else min(batch_size, largest)
        given = {"health_every": 0, **self.settings, **variant.settings}
        given["layers"] = parse_layers(given.get("layers"))
        try:
            config = EditConfig.create(
                **{**given, "method": variant.method, "batch_size": size, "seed": seed}
            )
        except ConfigError as error:
            raise ConfigError(f"method {variant.label!r}: {error}") from error
        if config.on_collapse == "rollback":
            raise ConfigError(
                f"method {variant.label!r}: on_collapse 'rollback' asked; in a benchmark a collapse is measured, not "
                "taken back: choose 'stop' or 'continue'"
            )
        return Cell(self, variant, dataset, config)


@dataclass(frozen=True)
class Cell:
    """One method on one stream with one seed.

    Args:
        plan: What it is part of.
        variant: The method and its settings.
        dataset: Name of the data set.
        config: Settings, not yet resolved against a model.
    """

    plan: Plan
    variant: Variant
    dataset: str
    config: EditConfig

    @property
    def title(self) -> str:
        """What it is, in words."""
        return (
            f"{self.dataset}, batch {self.config.batch_size}, seed {self.config.seed}: {self.variant.label}"
        )

    @property
    def id(self) -> str:
        """Name of its record: readable, and another one for everything that could change a number."""
        name = "-".join((Path(self.dataset).name, f"b{self.config.batch_size}", f"s{self.config.seed}"))
        readable = re.sub(r"[^\w.]+", "-", f"{name}-{self.variant.label}").strip("-")
        return f"{readable}-{hashlib.sha256(self._content().encode()).hexdigest()[:8]}"

    def _content(self) -> str:
        plan = self.plan.model_dump(mode="json")
        for axis in ("methods", "data", "batch_sizes", "seeds", "settings", "device"):
            plan.pop(axis)
        plan["protocols"] = sorted(PROTOCOLS[name].version for name in self.plan.protocols)
        content = [plan, self.variant.label, self.dataset, self._settings()]
        return json.dumps(content, sort_keys=True)

    def _settings(self) -> dict[str, Any]:
        """All settings that could change a number, the method's defaults among them."""
        config = self.config
        if self.variant.method != UNEDITED:
            config = with_defaults(config)
        return config.model_dump(mode="json", exclude={*CUT_UP})


def parse_span(text: str) -> tuple[int, int | None]:
    """Two numbers out of "START:STOP"; the second None when it is left out.

    Raises:
        ConfigError: If it is no such span, or an empty one.
    """
    span = _SPAN.fullmatch(text)
    start, stop = (int(span[1] or 0), int(span[2]) if span[2] else None) if span else (0, 0)
    if stop is not None and stop <= start:
        raise ConfigError(f"records {text!r} is no span; write START:STOP, such as '0:100' or '500:'")
    return start, stop


def _refuse_axes(settings: dict[str, Any], where: str) -> None:
    for name in _AXES:
        if name in settings:
            raise ConfigError(f"{where} set {name!r}, which the plan varies itself; use its own field for it")
