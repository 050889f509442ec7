"""The one schema of settings: Python, YAML files and command-line flags all fill an `EditConfig`."""

from __future__ import annotations

import difflib
import re
import reprlib
import stat
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import (
    BaseModel,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    field_validator,
)

from nmke.errors import ConfigError

MaskName = Literal[
    "entropy", "random", "none", "general", "specific", "overlap", "non-overlap", "fixed", "least"
]
LEAST = "least"
AttributionTarget = Literal["predicted", "new", "true"]
AttributionToken = Literal["last", "subject"]
AUTO = "auto"
MOST_BYTES = 2**20  # of a YAML file; the longest plan of ours has two thousand


class EditConfig(BaseModel, frozen=True, extra="forbid"):
    """Everything that decides what an edit does. `None` means: the method's own default, else the probe's."""

    method: str = Field("nmke", description="Editing method; `nmke doctor` lists them.")
    layers: tuple[int, ...] | None = Field(
        None, description="Layers to edit, ascending; None: by relative depth."
    )
    batch_size: PositiveInt = Field(10, description="Edits solved together.")
    seed: int = Field(0, description="Seed of contexts, random masks and the self-written corpus.")

    steps: PositiveInt = Field(25, description="Forward passes of the target optimisation, at most.")
    rounds: PositiveInt = Field(
        1,
        description="Rounds of so many steps, at most: an edit whose target is not found (p < .9) at the end of one "
        "gets another, with twice the clamp; `nmke` has 2.",
    )
    hold_earlier: bool = Field(
        False,
        description="Whether a target has to leave the answers of earlier edits of the same subject as they are; such "
        "edits then go into different batches; `nmke` does.",
    )
    lr: PositiveFloat = Field(0.5, description="Adam learning rate of the target optimisation.")
    clamp: PositiveFloat = Field(0.75, description="Largest ‖delta‖, in units of ‖h0‖.")
    weight_decay: NonNegativeFloat = Field(0.5, description="Weight of ‖delta‖/‖h0‖² in the loss.")
    kl_factor: NonNegativeFloat = Field(0.0625, description="Weight of the KL on '{subject} is a'.")
    stop_loss: NonNegativeFloat = Field(0.05, description="An edit stops once its loss is below this (nats).")
    targets: Literal["auto", "spread", "joint"] = Field(
        "auto", description="Where targets live: spread over layers (MEMIT) or joint; auto asks the model."
    )
    stop_argmax: NonNegativeInt = Field(
        0,
        description="Stop an edit once its answer is the argmax in every context on so many steps in a row; 0: never.",
    )
    context_tokens: PositiveInt = Field(10, description="Length of each self-written context, tokens.")
    token_budget: PositiveInt = Field(
        384, description="Tokens optimised at once: bounds memory, and edits of like length share a group."
    )

    products: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="Matrix products of the target optimisation: auto takes bfloat16 for a float32 model on a "
        "processor with instructions for it.",
    )

    l2: NonNegativeFloat | None = Field(None, description="Ridge λ of the solve.")
    covariance_weight: PositiveFloat | None = Field(None, description="Weight w0 of ordinary keys.")
    covariance_rank: PositiveInt | None = Field(
        None,
        description="Directions of ordinary keys that a mask per edit keeps one by one, the others share their mean: "
        "bounds memory in large layers; None: all.",
    )
    residual_ridge: NonNegativeFloat = Field(
        0.1,
        description="ε of the combination that mask_scope 'edit' meets residuals with: 1 is least squares, 0 exact.",
    )
    null_space: Literal["threshold", "share", "energy"] = Field(
        "threshold", description="How AlphaEdit's null space is chosen."
    )
    null_space_value: PositiveFloat = Field(
        2e-2, description="Threshold, or share of directions or of energy."
    )

    radius: PositiveFloat = Field(
        0.1, description="GRACE: radius of a new entry of the codebook, in units of the hidden state's norm."
    )
    stabilisers: tuple[str, ...] = Field(
        (), description="Names, comma-separated: what to add against collapse, in this order."
    )

    mask: MaskName = Field(
        "none",
        description="Which neurons may change; least: those that ordinary text uses least, whole.",
    )
    mask_scope: Literal["batch", "edit"] = Field(
        "batch", description="One mask for a batch, as NMKE has it, or one for each edit of it."
    )
    placement: Literal["in-solve", "after-solve"] = Field(
        "in-solve",
        description="NMKE's mask inside the solve, or applied to AlphaEdit's solution as published.",
    )
    variant: Literal["paper", "released"] = Field(
        "paper", description="Constants and tie rule of the ratios."
    )
    ratio: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Share of neurons for mask 'random', and for 'fixed' with mask_scope 'edit'; None: as many as "
        "entropy would keep.",
    )
    attribution: str = Field(
        "lps",
        description="Neuron score: lps, psa, mpc, contribution, gradient, integrated or ablation (slow); with "
        "mask_scope 'edit': write, energy or mpc.",
    )
    attribution_target: AttributionTarget = Field(
        "predicted",
        description="Whose log-probability is attributed: the model's guess, the new or the true answer.",
    )
    attribution_token: AttributionToken = Field("last", description="Token at which neurons are scored.")
    amplification: PositiveFloat = Field(30.0, description="Factor a on the neuron's coefficient.")
    temperature: PositiveFloat = Field(30.0, description="Factor τ inside the entropy's softmax.")

    corpus: str = Field("self", description="Text for key statistics: self, a file, or hf:NAME.")
    corpus_tokens: PositiveInt = Field(30_000, description="Tokens of that text.")

    health_every: NonNegativeInt = Field(
        1, description="Look at the model's health every so many batches; 0: never."
    )
    on_collapse: Literal["stop", "rollback", "continue"] = Field(
        "stop", description="At a stop limit: stop, take the batch back and stop, or warn and continue."
    )
    kl_warn: PositiveFloat = Field(
        0.3, description="Warn above this KL to the unedited model (nats per token)."
    )
    kl_stop: PositiveFloat = Field(2.0, description="Stop above this KL to the unedited model.")
    perplexity_warn: PositiveFloat = Field(
        1.15, description="Warn above this perplexity, in units of the unedited model's."
    )
    perplexity_stop: PositiveFloat = Field(2.0, description="Stop above this perplexity, in the same units.")
    retention_warn: NonNegativeFloat = Field(
        0.7, description="Warn when less than this share of the earlier edits asked again still holds."
    )
    retention_stop: NonNegativeFloat = Field(0.3, description="Stop below this share of earlier edits.")

    @field_validator("stabilisers", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        """Names from one comma-separated text, as flags and variables give them."""
        return tuple(filter(None, re.split(r"[,\s]+", value))) if isinstance(value, str) else value

    @field_validator("corpus")
    @classmethod
    def _absolute(cls, value: str) -> str:
        """A file by its whole path, so that the record leads to it from any folder."""
        is_name = value == cls.model_fields["corpus"].default
        return str(Path(value).resolve()) if is_file(value) and not is_name else value

    @classmethod
    def create(cls, **settings: Any) -> EditConfig:
        """An `EditConfig` from settings by name; `None` values are left at their default.

        Raises:
            ConfigError: If a setting is unknown (the nearest is named) or out of range.
        """
        given = {name: value for name, value in settings.items() if value is not None}
        try:
            return cls(**given)
        except ValidationError as error:
            raise ConfigError(explain(error, cls)) from error

    def filled(self, defaults: dict[str, Any]) -> EditConfig:
        """This config with `defaults` wherever nothing was set explicitly."""
        extra = {name: value for name, value in defaults.items() if name not in self.model_fields_set}
        return self.create(**{**self.model_dump(exclude_unset=True), **extra})


def replace_config(config: EditConfig, **changes: Any) -> EditConfig:
    """The settings with some changed."""
    return EditConfig.create(**{**config.model_dump(exclude_unset=True), **changes})


class _PlainYaml(yaml.SafeLoader):
    """Plain values only: an alias can make a few lines stand for gigabytes."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            alias = self.peek_event()
            raise yaml.composer.ComposerError(
                None, None, "found an alias; write the value out", alias.start_mark
            )
        return super().compose_node(parent, index)


def is_file(name: str) -> bool:
    """Whether there is a file of that name; text that can be no path names none."""
    try:
        return Path(name).is_file()
    except (OSError, ValueError):
        return False


def read_config(path: Path) -> dict[str, Any]:
    """Settings from a YAML file.

    Raises:
        ConfigError: If the file is missing, not YAML, not a mapping, or over a megabyte.
    """
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode) or found.st_size > MOST_BYTES:
            raise ValueError(f"no regular file of at most {MOST_BYTES:,} bytes")
        loaded = yaml.load(path.read_text(encoding="utf-8"), Loader=_PlainYaml)
    except (OSError, ValueError, OverflowError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(
            f"config {str(path)!r} cannot be read: {str(error)[:300]}; give a YAML file of settings"
        ) from error
    if not isinstance(loaded, dict):
        raise ConfigError(f"config {str(path)!r} is not a mapping; write one `setting: value` per line")
    return {str(name): value for name, value in loaded.items()}


def parse_layers(value: Any) -> tuple[int, ...] | None:
    """Layers from "auto", "4-8" or "4,5,7-9", or from a list in a YAML file.

    Raises:
        ConfigError: If the text is none of these.
    """
    if value is None or value == AUTO:
        return None
    if isinstance(value, int):
        return (value,)
    if not isinstance(value, str):
        return tuple(value) if isinstance(value, list | tuple) else value
    layers: list[int] = []
    for part in value.split(","):
        span = re.fullmatch(r"\s*(\d{1,4})\s*(?:-\s*(\d{1,4})\s*)?", part)
        if span is None:
            raise ConfigError(
                f"layers {value!r} cannot be read; write 'auto', a range as '4-8' or a list as '4,5,6'"
            )
        layers += range(int(span[1]), int(span[2] or span[1]) + 1)
    return tuple(layers)


def explain(error: ValidationError, schema: type[BaseModel]) -> str:
    """What is wrong with settings, by name, in one line.

    Args:
        error: As pydantic raised it.
        schema: The class whose fields they are, to name the nearest.
    """
    lines = []
    for item in error.errors():
        name = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            near = difflib.get_close_matches(name, schema.model_fields, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(schema.model_fields)}"
            lines.append(f"unknown setting {name!r}{hint}")
        elif item["type"] == "missing":
            lines.append(f"setting {name!r} is missing; give it")
        else:
            lines.append(f"setting {name!r} is {reprlib.repr(item.get('input'))}: {item['msg'].lower()}")
    return "; ".join(lines)
