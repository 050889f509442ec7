"""Parameter stability as figures: column norms and directions, spectrum, and the columns in two dimensions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nmke.viz.figures import Axis, Figure, Series, ordered


def stability_figures(stability: Mapping[str, Any]) -> list[Figure]:
    """Figures of what `measure_stability` found; none when no layer differs from the base.

    Args:
        stability: `layers` by number, and the `projection` of the layer that moved most.
    """
    layers = dict(stability.get("layers") or {})
    if not layers:
        return []
    figures = [_norms(layers), _cosines(layers), _spectrum(layers)]
    if stability.get("projection"):
        figures.append(_projection(stability["projection"]))
    return figures


def _norms(layers: Mapping[str, Any]) -> Figure:
    values = tuple(numbers["wasserstein"] / numbers["mean_column_norm"] for numbers in layers.values())
    return Figure(
        "column-norms",
        "Did neurons become louder or quieter?",
        "First Wasserstein distance between the norms of the layer's columns in the base and now, in per cent of the "
        "mean norm in the base; 0 if no column's norm changed.",
        Axis("layer", categories=tuple(layers)),
        Axis("distance of column norms (% of their mean)", low=0.0, percent=True),
        (Series("edited layers", _places(layers), values, mark="bars", colour=0),),
    )


def _cosines(layers: Mapping[str, Any]) -> Figure:
    means = tuple(numbers["cosine_mean"] for numbers in layers.values())
    spread = [numbers["cosine_std"] for numbers in layers.values()]
    return Figure(
        "cosines",
        "Do neurons still write in the same direction?",
        "Cosine between each column in the base and now. Dot: mean over the layer's columns; line: one standard "
        "deviation to each side (a spread, no interval); ring: the column that turned most.",
        Axis("layer", categories=tuple(layers)),
        Axis("cosine to the base", high=1.0),
        (
            Series(
                "mean ± standard deviation",
                _places(layers),
                means,
                tuple(m - s for m, s in zip(means, spread, strict=True)),
                tuple(min(1.0, m + s) for m, s in zip(means, spread, strict=True)),
                mark="dots",
                colour=0,
            ),
            Series(
                "lowest",
                _places(layers),
                tuple(numbers["cosine_min"] for numbers in layers.values()),
                mark="rings",
                colour=1,
            ),
        ),
    )


def _spectrum(layers: Mapping[str, Any]) -> Figure:
    series = []
    for number, (layer, numbers) in enumerate(layers.items()):
        before, after = numbers["singular_before"], numbers["singular_after"]
        ratio = tuple(
            b / a if a > 0 else None for a, b in zip(before["values"], after["values"], strict=True)
        )
        rank = tuple(float(1 + i * before["every"]) for i in range(len(ratio)))
        series.append(Series(f"layer {layer}", rank, ratio, colour=ordered(number, len(layers))))
    unchanged = Series("unchanged", (1.0,), (1.0,), mark="rule", colour=5)
    return Figure(
        "spectrum",
        "Singular values, now over before",
        "The layer's singular values by rank, largest first, each over the base's of the same rank. Above 1 the "
        "matrix has grown there; a tail that rises means that writes went where the base wrote little.",
        Axis("rank of the singular value", whole=True),
        Axis("now / before"),
        (*series, unchanged),
    )


def _projection(projection: Mapping[str, Any]) -> Figure:
    across, up = (
        f"axis {i + 1} ({share:.1%} of the base's variance)"
        for i, share in enumerate(projection["explained"])
    )
    before, after = projection["before"], projection["after"]
    columns = Series(
        "a column, from base to now",
        tuple(point[0] for point in before),
        tuple(point[1] for point in before),
        mark="arrows",
        x_to=tuple(point[0] for point in after),
        y_to=tuple(point[1] for point in after),
        colour=0,
    )
    return Figure(
        "columns",
        f"Columns of layer {projection['layer']} in two dimensions",
        f"{len(before)} of {projection['columns']} columns on the two main axes of the base's columns (principal "
        f"components): the {projection['farthest']} that moved farthest and others drawn at random, in the layer that "
        "moved most. A dot alone has not moved. Most of the variance lies on other axes.",
        Axis(across),
        Axis(up),
        (columns,),
    )


def _places(layers: Mapping[str, Any]) -> tuple[float, ...]:
    return tuple(float(i) for i in range(len(layers)))
