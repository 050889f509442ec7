"""The part of a report on a record of `nmke neurons`: where in the model general and specific neurons sit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nmke.damage import load_json, reason
from nmke.errors import RequestError
from nmke.viz.figures import Axis, Figure, Heat, Series, Value, numbers
from nmke.viz.report import Cell, Section, Table
from nmke.viz.scales import counted, label

SCHEMA = "nmke.neurons/1"
NAME = "neurons.json"
KINDS = ("general", "specific")
MOST_TOKENS = 6
MOST_TEXT = 80


def read_neurons(path: Path) -> dict[str, Any]:
    """The record at `path`.

    Raises:
        RequestError: If it is missing, damaged or of another schema.
    """
    try:
        content = load_json(path.read_text(encoding="utf-8"))
        found = content["schema"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RequestError(
            f"neuron record {str(path)!r} cannot be read ({reason(error)}); make one with "
            f"`nmke neurons MODEL -o {path.name}`"
        ) from error
    if found != SCHEMA:
        raise RequestError(f"neuron record {str(path)!r} has schema {found!r}, this version reads {SCHEMA!r}")
    return dict(content)


def neuron_section(record: Mapping[str, Any]) -> Section:
    """The section on a record.

    Raises:
        RequestError: If a field that the charts need is missing.
    """
    try:
        metrics, model = record["metrics"], record["model"]
        first = next(iter(metrics))
        figures = [
            _map(metrics, model["edited_layers"]),
            _sets(first, metrics[first]),
            _entropies(first, metrics[first]),
        ]
        figures += [_depth(name, metric, len(record["facts"])) for name, metric in metrics.items()]
        text = (
            f"{counted(len(record['facts']), 'fact')}, {counted(len(record['prompts']), 'prompt')}, scored at the "
            f"{record['settings']['token']} token for the {record['settings']['target']} answer; "
            f"{model['name']}, {model['n_layers']} layers. "
            f"Edits write to layers {', '.join(map(str, model['edited_layers']))}."
        )
        tables = (_described(record["neurons"], first),) if record["neurons"] else ()
    except (KeyError, StopIteration, TypeError, IndexError) as error:
        raise RequestError(
            f"the neuron record lacks {error!r}; make it again with `nmke neurons MODEL -o {NAME}`"
        ) from error
    return Section("neuron-survey", "Where neurons sit in the whole model", (text,), tables, tuple(figures))


def _map(metrics: Mapping[str, Any], edited: Sequence[int]) -> Figure:
    """Layers by depth, a row for each metric and kind."""
    names, rows = [], []
    layers: tuple[str, ...] = ()
    for name, metric in metrics.items():
        for kind in KINDS:
            profile = metric["over_all_layers"][kind]
            layers = tuple(map(str, profile["layers"]))
            names.append(f"{name}, {kind}")
            rows.append(numbers(profile["shares"]))
        overlap, size = metric["over_all_layers"]["overlap"], metric["over_all_layers"]["neurons"]
        names.append(f"{name}, both")
        rows.append(tuple(count / size for count in overlap))
    return Figure(
        "neuron-map",
        "Neuron map: layers by depth",
        "Share of each set of top neurons, ranked over all layers together, that sits in a layer; darker (on a dark "
        f"ground: lighter) is more. Both: in the general and in the specific set. "
        f"Edited layers: {edited[0]} to {edited[-1]}.",
        Axis("layer (0 reads the embeddings)", categories=layers),
        Axis("", categories=tuple(names)),
        heat=Heat(tuple(rows), "share of the set", percent=True),
    )


def _sets(name: str, metric: Mapping[str, Any]) -> Figure:
    """What an edit would choose in each layer."""
    rows = metric["layers"]
    x = tuple(float(row["layer"]) for row in rows)
    parts: tuple[tuple[str, tuple[Value, ...]], ...] = (
        ("general only", tuple((row["general"] - row["overlap"]) / row["d_mlp"] for row in rows)),
        ("general and specific", tuple(row["overlap"] / row["d_mlp"] for row in rows)),
        ("specific only", tuple((row["specific"] - row["overlap"]) / row["d_mlp"] for row in rows)),
    )
    return Figure(
        "neuron-sets",
        "Neurons that an edit would choose",
        f"By {name}, each layer for itself: general if high for most prompts, specific if very high for one.",
        Axis("layer", whole=True),
        Axis("share of the layer's neurons", low=0.0, high=1.0, percent=True),
        tuple(Series(part, x, values, mark="bars", colour=i) for i, (part, values) in enumerate(parts)),
    )


def _entropies(name: str, metric: Mapping[str, Any]) -> Figure:
    rows = metric["layers"]
    x = tuple(float(row["layer"]) for row in rows)
    return Figure(
        "neuron-entropy",
        "Is importance spread over many neurons?",
        f"Entropy of the scores by {name} over that of an even spread: 1 when all neurons matter alike, 0 when one "
        "does. It sets how many neurons an edit may write into.",
        Axis("layer", whole=True),
        Axis("entropy (share of the largest possible)", low=0.0, high=1.0),
        tuple(
            Series(kind, x, numbers([row[f"{kind}_entropy"] for row in rows]), colour=i)
            for i, kind in enumerate(KINDS)
        ),
    )


def _depth(name: str, metric: Mapping[str, Any], facts: int) -> Figure:
    over = metric["over_all_layers"]
    series = tuple(
        Series(
            f"{kind} (centre {over[kind]['centre'][0]:.2f})",
            tuple(float(layer) for layer in over[kind]["layers"]),
            numbers(over[kind]["shares"]),
            numbers(over[kind]["low"]),
            numbers(over[kind]["high"]),
            colour=i,
        )
        for i, kind in enumerate(KINDS)
    )
    return Figure(
        f"depth-{name}",
        f"Depth of top neurons by {name}",
        f"{metric['summary']}. Share of the top {over['neurons']} neurons of all layers that sits in each layer; "
        f"bands: 95 % bootstrap intervals over {counted(facts, 'fact')}. Centre: mean depth, 0 the first layer, 1 "
        "the last.",
        Axis("layer", whole=True),
        Axis("share of the set", low=0.0, percent=True),
        series,
    )


def _described(neurons: Sequence[Mapping[str, Any]], metric: str) -> Table:
    rows = tuple(
        (
            Cell(f"{one['layer']}.{one['neuron']}", "number"),
            ", ".join(one["kinds"]),
            Cell(label(one["scores"][metric]["max"]), "number"),
            " ".join(repr(said["token"]) for said in one["promotes"][:MOST_TOKENS]),
            "\n".join(
                f"{place['token']!r} in …{place['text'][-MOST_TEXT:]}" for place in one["excited_by"][:2]
            ),
        )
        for one in neurons
    )
    columns = ("layer.neuron", "kind", f"highest {metric}", "promotes", "excited by")
    note = (
        "Promotes: tokens that its value raises most through final norm and unembedding. Excited by: texts with its "
        "largest coefficients."
    )
    return Table("neurons", columns, rows, "Neurons that stand out", note)
