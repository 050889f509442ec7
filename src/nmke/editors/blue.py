"""BLUE: edit only the first and the last of the layers, each for target values of its own.

Source: Li et al. 2025, arXiv:2502.03748 (boundary layer update): no residual is spread; the first layer is written
for values found at its own output, then the last layer for values found at its own output in the model so written.
Differs: the paper's text was not at hand; built from its abstract and from how others describe it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from nmke.config import EditConfig
from nmke.editors.stabilisers import Stabiliser, stabilisers

if TYPE_CHECKING:
    from nmke.editors.pipeline import BatchResult, ProvisionalWrites

BLUE = "blue"

stabilisers.register(
    BLUE,
    Stabiliser(min_layers=2),
    source="arXiv:2502.03748",
    summary="write the first and the last layer only, each for its own target values",
    doc=__doc__,
)


def in_both_layers(
    config: EditConfig, writes: ProvisionalWrites, compute: Callable[[EditConfig], BatchResult]
) -> BatchResult:
    """A batch computed for the first layer, and then for the last one behind it.

    Args:
        config: Settings with the layers asked for.
        writes: Holds the first layer's write while the last one is computed.
        compute: Computes the batch with settings that name one layer, on the model as it is.
    """
    assert config.layers is not None
    ends = (config.layers[0], config.layers[-1])
    of_first, of_last = (config.model_copy(update={"layers": (layer,)}) for layer in ends)
    with writes:
        first = compute(of_first)
        writes.add(first.updates[0])
        last = compute(of_last)
    stages = [*first.seconds, *(stage for stage in last.seconds if stage not in first.seconds)]
    return replace(
        last,
        updates=(*first.updates, *last.updates),
        memory_keys={**first.memory_keys, **last.memory_keys},
        targets=replace(
            last.targets,
            layers=(*first.targets.layers, *last.targets.layers),
            deltas={**first.targets.deltas, **last.targets.deltas},
            values={**first.targets.values, **last.targets.values},
            steps=tuple(a + b for a, b in zip(first.targets.steps, last.targets.steps, strict=True)),
        ),
        masks={**first.masks, **last.masks},
        score_summaries={**first.score_summaries, **last.score_summaries},
        seconds={s: first.seconds.get(s, 0.0) + last.seconds.get(s, 0.0) for s in stages},
    )
