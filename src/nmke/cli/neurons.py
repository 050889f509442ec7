"""`nmke neurons`: which neurons carry what, in every layer, by every metric."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nmke.cli import options
from nmke.cli.console import fact, note, print_json, progress, say, table
from nmke.cli.opening import Loading, is_run, load, open_run, read_file
from nmke.errors import ConfigError

if TYPE_CHECKING:
    from nmke.config import EditConfig
    from nmke.models.load import EditableModel
    from nmke.types import EditRequest

ALL, QUICK = "all", "quick"
WORDS = 44


def neurons(
    source: options.Source,
    facts: Annotated[
        Path | None,
        typer.Option("-f", "--facts", help="Facts to look for (default: the run's, else the bundled ones)."),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Only the first N facts.")] = 5,
    metric: Annotated[
        str, typer.Option("--metric", help="Metrics, with commas; quick: four; all: all but ablation.")
    ] = QUICK,
    layers: Annotated[str, typer.Option(help="all, or such as 4-8 or 4,5,6.")] = ALL,
    token: Annotated[str, typer.Option(help="Where neurons are scored: last or subject.")] = "last",
    target: Annotated[
        str, typer.Option(help="Whose probability counts: predicted, new or true.")
    ] = "predicted",
    bare: Annotated[bool, typer.Option("--bare", help="Bare prompts, without contexts in front.")] = False,
    share: Annotated[
        float, typer.Option(min=1e-6, max=1, help="Size of the sets drawn over all layers at once.")
    ] = 0.01,
    shown: Annotated[
        int, typer.Option("-n", "--neurons", min=0, help="Neurons of either kind to describe.")
    ] = 5,
    amplification: Annotated[float, typer.Option(help="Factor on a neuron's write, for lps and psa.")] = 30.0,
    temperature: Annotated[float, typer.Option(help="Factor inside the entropy's softmax.")] = 30.0,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Keep the record as JSON.")] = None,
    as_json: options.Json = False,
    dtype: options.Dtype = "float32",
    device: options.Device = "auto",
) -> None:
    """Show which neurons carry facts: scores of every layer, general and specific sets, what neurons say."""
    from nmke.cli.settings import parse_layers
    from nmke.config import EditConfig

    config = EditConfig.create(
        attribution_token=token,
        attribution_target=target,
        amplification=amplification,
        temperature=temperature,
    )
    metrics = read_metrics(metric)
    requests = None if facts is None else read_file(facts, limit)
    chosen = None if layers == ALL else parse_layers(layers)
    asked = Asked(config, metrics, chosen, bare, share, shown)
    if is_run(source):
        with closing(open_run(Path(source), device)) as session:
            held = requests or session.active_requests()[:limit] or _bundled(limit)
            found = look(session.model, held, asked, session.folder.contexts, session.config.layers)
    else:
        model = load(source, Loading(dtype, device))
        found = look(model, requests or _bundled(limit), asked)
    if output is not None:
        output.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        note(f"record written to {output}")
    if as_json:
        print_json(found)
    else:
        _show(found)


@dataclass(frozen=True)
class Asked:
    """What the command line asks of a model."""

    config: EditConfig
    metrics: tuple[str, ...]
    layers: tuple[int, ...] | None
    bare: bool
    share: float
    shown: int


def read_metrics(text: str) -> tuple[str, ...]:
    """Names of metrics out of the flag.

    Raises:
        ConfigError: If one is unknown; names the nearest.
    """
    from nmke.attribution import neuron_scores
    from nmke.neurons.survey import QUICK as QUICK_METRICS
    from nmke.neurons.survey import fast_metrics

    names = [name.strip() for name in text.split(",") if name.strip()] or [QUICK]
    groups = {QUICK: QUICK_METRICS, ALL: fast_metrics()}
    chosen = [one for name in names for one in groups.get(name, (name,))]
    return tuple(dict.fromkeys(neuron_scores.entry(name).name for name in chosen))


def look(
    model: EditableModel,
    requests: Sequence[EditRequest],
    asked: Asked,
    contexts: Sequence[str] | None = None,
    edited: Sequence[int] | None = None,
) -> dict[str, Any]:
    """The record of a survey of `model`.

    Args:
        model: The model, edited or not.
        requests: The facts to look for.
        asked: What is wanted.
        contexts: The run's prefixes; None to write them now.
        edited: The layers that the run edits; None for the default ones.
    """
    from nmke.editors.contexts import write_contexts
    from nmke.editors.pipeline import default_layers
    from nmke.health import heldout_texts
    from nmke.neurons import survey
    from nmke.neurons.record import survey_record
    from nmke.readable import check_requests

    check_requests(model, requests)
    _check_layers(asked.layers, model.layout.n_layers)
    used: Sequence[str] = ("",) if asked.bare else contexts or write_contexts(model)
    found = survey(model, requests, used, asked.metrics, asked.config, asked.layers, progress())
    return survey_record(
        model,
        found,
        requests,
        asked.config,
        edited or default_layers(model.layout.n_layers),
        share=asked.share,
        shown=asked.shown,
        texts=heldout_texts(),
    )


def _check_layers(layers: Sequence[int] | None, n_layers: int) -> None:
    wrong = [layer for layer in layers or () if not 0 <= layer < n_layers]
    if wrong:
        raise ConfigError(f"layer {wrong[0]} was asked for; this model has 0 to {n_layers - 1}")


def _bundled(limit: int) -> list[EditRequest]:
    from nmke.facts import bundled_facts

    return list(bundled_facts()[:limit])


def _show(found: dict[str, Any]) -> None:
    settings, metrics = found["settings"], found["metrics"]
    first = next(iter(metrics))
    fact(
        "model",
        f"{found['model']['name']}: {found['model']['n_layers']} layers, {sum(found['model']['d_mlp'])} neurons",
    )
    fact(
        "scored",
        f"{len(found['prompts'])} prompts of {len(found['facts'])} facts at the "
        f"{'last token' if settings['token'] == 'last' else 'last token of the subject'}; "
        f"whose probability: {settings['target']}",
    )
    say()
    fact(first, f"{metrics[first]['summary']} ({metrics[first]['unit']})")
    edited = set(found["model"]["edited_layers"])
    columns = ("general", "specific", "overlap", "entropy", "top general", "top specific")
    layers = enumerate(metrics[first]["layers"])
    rows = [_layer_row(number, row, metrics[first], edited) for number, row in layers]
    table(("layer", *columns), rows, right=columns)
    share = f"{settings['share']:.3g}"
    note(
        f"* edited by default; top: how much of the model's top {share} of neurons of that kind lies in the layer"
    )
    metric_columns = ("seconds", "general: depth", "specific: depth")
    metric_rows = [_metric_row(name, one) for name, one in metrics.items()]
    table(("metric", *metric_columns), metric_rows, right=metric_columns)
    note("depth: of that top, 0 the first layer, 1 the last, 0.5 spread evenly; 95 % intervals over facts")
    for one in found["neurons"]:
        _show_neuron(one, first)


def _layer_row(number: int, row: dict[str, Any], metric: dict[str, Any], edited: set[int]) -> tuple[str, ...]:
    wide = metric["over_all_layers"]
    return (
        f"{row['layer']}{'*' if row['layer'] in edited else ''}",
        str(row["general"]),
        str(row["specific"]),
        str(row["overlap"]),
        f"{row['general_entropy']:.3f}",
        f"{wide['general']['shares'][number]:.1%}",
        f"{wide['specific']['shares'][number]:.1%}",
    )


def _metric_row(name: str, metric: dict[str, Any]) -> tuple[str, ...]:
    wide = metric["over_all_layers"]
    depths = (interval(wide[kind]["centre"], "{:.2f}") for kind in ("general", "specific"))
    return (name, f"{metric['seconds']:.1f}", *depths)


def interval(values: Sequence[float], form: str) -> str:
    """Mean with its interval, such as "0.71 [0.66, 0.75]"."""
    mean, low, high = (form.format(value) for value in values)
    return f"{mean} [{low}, {high}]"


def _show_neuron(one: dict[str, Any], metric: str) -> None:
    score = one["scores"][metric]
    fact(
        f"{one['layer']}.{one['neuron']}",
        f"{' and '.join(one['kinds'])}: {metric} mean {score['mean']:.2g}, highest {score['max']:.2g}",
    )
    fact("", f"says {_tokens(one['promotes'])}; when negative {_tokens(one['promotes_when_negative'])}")
    for place in one["excited_by"]:
        fact("", f"hears {place['coefficient']:+.2f} at {place['token']!r} in “{short_end(place['text'])}”")


def _tokens(tokens: Sequence[dict[str, Any]]) -> str:
    return " ".join(repr(one["token"]) for one in tokens)


def short_end(text: str) -> str:
    """The end of a text, which is where the neuron is."""
    plain = " ".join(text.split())
    return plain if len(plain) <= WORDS else f"…{plain[-WORDS:]}"
