"""The contracts of an editing method: what a solver gets and gives, and what a method is made of.

Every solver answers one question: along which directions in key space should the residuals be written?
With keys K and residuals R the update is ΔW = Rᵀ X, so that the solver needs only the keys: X [edits, d_mlp].
A method that is not of the locate-then-edit family computes its batch itself (`Compute`), and may keep a side
memory (`nmke.editors.side`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from nmke.config import LEAST, EditConfig, replace_config
from nmke.editors.known_targets import FindTargets
from nmke.editors.memory import KeyMemory, SolverState
from nmke.editors.side import Recall, SideMemory
from nmke.editors.targets import optimise_targets
from nmke.masking.per_edit import suits_edit
from nmke.models.layout import ModelLayout
from nmke.models.load import EditableModel
from nmke.progress import Progress, quiet
from nmke.registry import Registry
from nmke.stats.covariance import LayerStats, OrdinaryInputs
from nmke.types import EditRequest, Keys, Mask

if TYPE_CHECKING:
    from nmke.editors.pipeline import BatchResult

Directions = Float[Tensor, "edits d_mlp"]

# What an entry may need.
STATISTICS = "key statistics"  # the second moment of ordinary keys, per edited layer (`nmke prepare`)
INPUT_STATISTICS = (
    "input statistics"  # the second moment of ordinary MLP inputs, per edited layer (`nmke prepare`)
)
SIDE_MEMORY = "side memory"  # tensors beside the weights that are looked up at inference
PROMPT = "prompt"  # text in front of every prompt
PEFT = "peft"  # the extra `lora`

# Settings that choose neurons for a solve, or change it.
OF_A_SOLVE = (
    "mask_scope", "placement", "variant", "ratio", "attribution", "attribution_target", "attribution_token",
    "stabilisers",
)  # fmt: skip


@runtime_checkable
class Solver(Protocol):
    """Pure linear algebra of a method."""

    def directions(
        self, keys: Keys, stats: LayerStats, memory: KeyMemory, keep: Mask | None, config: EditConfig
    ) -> Directions:
        """Rows X with ΔW = Rᵀ X.

        Args:
            keys: Keys of this batch, float64.
            stats: The layer's ordinary keys.
            memory: Keys of earlier edits.
            keep: Neurons that may change; None means all. A solver that cannot honour it in its system
                returns zeros in the other columns.
            config: Resolved settings.

        Returns:
            Float64 [edits, d_mlp].

        Raises:
            NumericsError: If a system is not finite or ill-conditioned.
        """
        ...


@dataclass(frozen=True)
class Batch:
    """All that a method may look at to compute one batch; the model is to be left as it was.

    Args:
        model: The model as it is now.
        requests: The facts to write.
        contexts: Prefixes of every prompt, the first one empty.
        config: Resolved settings, with `layers` given.
        progress: Told about each stage.
        side: The method's own side memory so far, None at first.
        stats: Key statistics of every edited layer, if the method needs them.
        inputs: Moments of ordinary MLP inputs of every edited layer, if it needs them.
        turn: Number of the batch in its run.
        state: Memory of earlier edits.
        anchors: Norm that target values are rescaled to, per layer; empty leaves them as they are.
        held: Earlier facts whose answers targets have to leave as they are, where the subject is the same.
        find_targets: Seeks target values on the model as it is now; `given` takes such as were found before for these
            requests on these weights.
    """

    model: EditableModel
    requests: Sequence[EditRequest]
    contexts: Sequence[str]
    config: EditConfig
    progress: Progress = quiet
    side: SideMemory | None = None
    stats: Mapping[int, LayerStats] = field(default_factory=dict)
    inputs: Mapping[int, OrdinaryInputs] = field(default_factory=dict)
    turn: int = 0
    state: SolverState = field(default_factory=SolverState)
    anchors: Mapping[int, float] = field(default_factory=dict)
    held: Sequence[EditRequest] = ()
    find_targets: FindTargets = optimise_targets

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers to edit."""
        assert self.config.layers is not None
        return self.config.layers


class Compute(Protocol):
    """What a method outside the locate-then-edit family does with a batch."""

    def __call__(self, batch: Batch) -> BatchResult:
        """What it would write.

        Raises:
            NumericsError: If a computation is not finite.
            RequestError: If a prompt does not fit the model.
        """
        ...


@dataclass(frozen=True)
class Method:
    """How a method edits: by a solver in the one pipeline, or by computing its batch itself.

    Args:
        solver: The linear algebra of a locate-then-edit method; None when `compute` is given.
        defaults: Settings that differ from `EditConfig`'s defaults.
        max_batch: Largest batch it is defined for (1 for ROME), None for any.
        max_layers: Largest number of layers it is defined for, None for any.
        remembers: Whether the keys of earlier edits enter its system.
        edit_masks: Whether it can take a mask for each edit of a batch (`mask_scope` "edit").
        batch_defaults: What takes the place of `defaults` when the mask asked for is one of a whole batch.
        normed_defaults: What is added to `defaults` where a norm or a factor stands behind the MLP.
        compute: Computes a batch without the pipeline.
        recall: How its side memory takes part in inference; None when it does not.
        layers: Its own choice of layers for a model of so many; None: as all methods do.
        share: How residuals are spread over the layers left: an equal part each, or the square root of that
            (PMET).
        value_at: Key at which the old value is read: the bare prompt's, or the mean key it writes to (R-ROME).
        targets_on: Weights that target values are found on.
        stabilisers: Stabilisers that are part of it.
        masks: The masks it takes, if these are others than a solver's.
        linear: The method that stands in when a mask or a setting is asked for that only a solve has.
    """

    solver: Solver | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)
    max_batch: int | None = None
    max_layers: int | None = None
    remembers: bool = True
    edit_masks: bool = False
    batch_defaults: Mapping[str, Any] = field(default_factory=dict)
    normed_defaults: Mapping[str, Any] = field(default_factory=dict)
    compute: Compute | None = None
    recall: Recall | None = None
    layers: Callable[[int], tuple[int, ...]] | None = None
    share: Literal["equal", "root"] = "equal"
    value_at: Literal["bare", "mean"] = "bare"
    targets_on: Literal["edited", "unedited"] = "edited"
    stabilisers: tuple[str, ...] = ()
    masks: tuple[str, ...] = ()
    linear: str | None = None

    def takes_mask(self, name: str) -> bool:
        """Whether it goes with that mask: a method without a solver goes with none, unless it names its own."""
        if self.masks:
            return name in self.masks
        return name == "none" or (self.solver is not None and name != LEAST)

    def fill(self, config: EditConfig, *, normed: bool = False) -> EditConfig:
        """The settings with the method's own wherever nothing was asked for.

        Args:
            config: What was asked for.
            normed: Whether a norm or a factor stands behind the model's MLPs.
        """
        defaults = {**self.defaults, **(self.normed_defaults if normed else {})}
        filled = config.filled(defaults)
        asked = "mask_scope" in config.model_fields_set
        if filled.mask_scope == "edit" and (asked or suits_edit(filled)):
            return filled
        return config.filled({**defaults, **self.batch_defaults})


methods: Registry[Method] = Registry("method")


def with_defaults(config: EditConfig, layout: ModelLayout | None = None) -> EditConfig:
    """The settings with the method's own wherever nothing was asked for.

    A method that names a linear one hands over to it what only a solve can do: other masks, so that the controls of
    `nmke` need no second name, and models that do not show what their neurons read.

    Args:
        config: What was asked for.
        layout: The model's; None while it is not known.

    Raises:
        ConfigError: If the method is unknown.
    """
    method = methods.get(config.method)
    normed = layout is not None and not layout.direct_write
    if method.linear is None:
        return method.fill(config, normed=normed)
    fields = EditConfig.model_fields
    asked = any(getattr(config, name) != fields[name].default for name in OF_A_SOLVE)
    asked |= "mask" in config.model_fields_set and not method.takes_mask(config.mask)
    hidden = layout is not None and not layout.layers[layout.n_layers // 2].shows_readings
    if asked or hidden:
        return methods.get(method.linear).fill(replace_config(config, method=method.linear), normed=normed)
    return method.fill(config, normed=normed)
