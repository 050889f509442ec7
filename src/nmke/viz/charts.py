"""A run's record as figures: does it take, does it last, what does it cost, and which neurons carry it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from nmke.viz.figures import Axis, Figure, Heat, Series, Value, ordered, share, wilson
from nmke.viz.run_record import Batch, NeuronUse, RunRecord
from nmke.viz.scales import counted

MOST_POINTS = 160
EDITS = Axis("edits so far", whole=True)


def run_figures(run: RunRecord) -> list[Figure]:
    """Every figure that the record has numbers for."""
    makers: tuple[Callable[[RunRecord], Figure | None], ...] = (
        scores_figure,
        taken_figure,
        probability_figure,
        score_stream_figure,
        kl_figure,
        perplexity_figure,
        drift_figure,
        seconds_figure,
        neurons_figure,
        use_figure,
    )
    found = [make(run) for make in makers] if run.batches else []
    return [figure for figure in found if figure is not None]


def scores_figure(run: RunRecord) -> Figure | None:
    """The newest scores of the model as it is, a dot and an interval per metric."""
    now = [record for record in run.scores if record.content_hash == run.content_hash]
    newest = {protocol: (record, scores) for record in now for protocol, scores in record.protocols.items()}
    rows = [
        (protocol, name, scores[name], *interval, record.n_facts)
        for protocol, (record, scores) in newest.items()
        for name, interval in scores["intervals"].items()
    ]
    if not rows:
        return None
    series = []
    for number, protocol in enumerate(newest):
        own = [(i, row) for i, row in enumerate(rows) if row[0] == protocol]
        series.append(
            Series(
                newest[protocol][1]["version"],
                x=tuple(row[2] for _, row in own),
                y=tuple(float(i) for i, _ in own),
                low=tuple(row[3] for _, row in own),
                high=tuple(row[4] for _, row in own),
                mark="dots",
                colour=number,
            )
        )
    counts = ", ".join(f"{p}: {counted(scores['n'], 'fact')}" for p, (_, scores) in newest.items())
    return Figure(
        "scores",
        "Scores of the model as it is now",
        f"Dot: mean over facts; line: 95 % bootstrap interval; {counts}. Locality is agreement with the unedited "
        "model on the neighbours. Three protocols measure three things: do not compare them with each other.",
        share("mean over facts"),
        Axis("", categories=tuple(row[1].replace("_", " ") for row in rows)),
        tuple(series),
    )


def taken_figure(run: RunRecord) -> Figure:
    """Share of each batch that the model says right after it, and of earlier edits that it still says."""
    groups = _grouped(run.batches)
    x = tuple(float(group[-1].edits) for group in groups)
    done = [sum(b.count("written") + b.count("known") for b in group) for group in groups]
    sizes = [sum(len(b.event.edits) for b in group) for group in groups]
    ends = [wilson(a, n) for a, n in zip(done, sizes, strict=True)]
    shares = tuple(a / n for a, n in zip(done, sizes, strict=True))
    took = Series("right after its batch", x, shares, *_ends(ends), colour=0)
    asked = [b for b in run.batches if b.health.get("retention") is not None]
    series = [took]
    if asked:
        held = [
            (
                sum(b.health["retention"] * b.health["asked"] for b in group),
                sum(b.health["asked"] for b in group),
            )
            for group in _grouped(asked)
        ]
        series.append(
            Series(
                "earlier edits, asked again",
                tuple(float(group[-1].edits) for group in _grouped(asked)),
                tuple(total / n for total, n in held),
                *_ends([wilson(total, n) for total, n in held]),
                colour=1,
            )
        )
    return Figure(
        "stream",
        "Do edits take, and do they last?",
        "Share of facts whose new answer the model gives word for word (teacher forced) right after their batch, and "
        "share of answer tokens still right for up to 20 earlier edits drawn at random after each batch. "
        "Bands: 95 % Wilson intervals.",
        EDITS,
        share("share of facts"),
        tuple(series),
    )


def probability_figure(run: RunRecord) -> Figure | None:
    """Probability of each new answer before and after its batch."""
    rows = [
        (batch.first + i + 1, record.detail)
        for batch in run.batches
        for i, record in enumerate(batch.event.edits)
        if "probability_after" in record.detail
    ]
    if not rows:
        return None
    step = -(-len(rows) // 400)
    shown = rows[::step]
    x = tuple(float(number) for number, _ in shown)
    thinned = f" Every {step}th edit is drawn." if step > 1 else ""
    series = (
        Series("before", x, tuple(d["probability_before"] for _, d in shown), mark="rings", colour=5),
        Series(
            "right after its batch", x, tuple(d["probability_after"] for _, d in shown), mark="dots", colour=0
        ),
    )
    return Figure(
        "probability",
        "Probability of the new answer",
        f"Of the whole new answer behind the prompt, for {counted(len(rows), 'fact')} that were written; measured by "
        f"the model at that time.{thinned}",
        Axis("edit", whole=True),
        share("probability of the new answer"),
        series,
    )


def score_stream_figure(run: RunRecord) -> Figure | None:
    """Teacher-forced scores at each state that was scored, when there are several."""
    points = {}
    for record in run.scores:
        edits = run.edits_at(record.content_hash)
        if edits is not None and "teacher_forced" in record.protocols:
            points[edits] = record.protocols["teacher_forced"]
    if len(points) < 2:
        return None
    names = ("reliability", "generalization", "locality")
    order = sorted(points)
    series = tuple(
        Series(
            name,
            tuple(float(edits) for edits in order),
            tuple(points[edits].get(name) for edits in order),
            tuple(points[edits]["intervals"].get(name, (None, None))[0] for edits in order),
            tuple(points[edits]["intervals"].get(name, (None, None))[1] for edits in order),
            colour=number,
        )
        for number, name in enumerate(names)
    )
    return Figure(
        "score-stream",
        "Scores each time the run was scored",
        "Protocol teacher_forced/1, on the facts that were scored at that time (they may differ from point to point). "
        "Bands: 95 % bootstrap intervals.",
        EDITS,
        share("mean over facts"),
        series,
    )


def kl_figure(run: RunRecord) -> Figure | None:
    """KL to the unedited model over the stream."""
    values = _health(run, "kl")
    if values is None:
        return None
    rules = _limits(run, values[1], ("kl_warn", "warning limit"), ("kl_stop", "stop limit"))
    return Figure(
        "kl",
        "How far the model's predictions have moved",
        "Mean KL(unedited ‖ edited) of the next token at about 50 positions of held-out text; 0 is the unedited model.",
        EDITS,
        Axis("KL (nats per token)", low=0.0),
        (Series("edited model", *values, colour=0), *rules),
    )


def perplexity_figure(run: RunRecord) -> Figure | None:
    """Perplexity on held-out text over the stream."""
    values = _health(run, "perplexity")
    if values is None:
        return None
    base = run.last_health.get("perplexity_base")
    unedited = () if base is None else (Series("unedited model", (0.0,), (base,), mark="rule", colour=5),)
    return Figure(
        "perplexity",
        "Perplexity on held-out text",
        "About 200 tokens of plain sentences in windows of 10, so higher than on long text. Cheap on purpose: it "
        "shows a collapse; small differences mean little.",
        EDITS,
        Axis("perplexity"),
        (Series("edited model", *values, colour=0), *unedited),
    )


def drift_figure(run: RunRecord) -> Figure | None:
    """Relative norm of the change of each layer over the stream."""
    drifts = [
        (batch.edits, batch.per_layer("drift")) for batch in run.batches if batch.event.body.get("drift")
    ]
    drifts = drifts[:: -(-len(drifts) // MOST_POINTS) or 1] if drifts else []
    layers = sorted({layer for _, drift in drifts for layer in drift})
    if not layers:
        return None
    series = tuple(
        Series(
            f"layer {layer}",
            tuple(float(edits) for edits, _ in drifts),
            tuple(drift.get(layer) for _, drift in drifts),
            colour=ordered(number, len(layers)),
        )
        for number, layer in enumerate(layers)
    )
    return Figure(
        "drift",
        "How far the weights have moved",
        "‖W − W_base‖ / ‖W_base‖ (Frobenius) of each edited layer's down-projection after each batch.",
        EDITS,
        Axis("drift (% of ‖W_base‖)", low=0.0, percent=True),
        series,
    )


def seconds_figure(run: RunRecord) -> Figure | None:
    """Seconds per edit by stage."""
    groups = _grouped([batch for batch in run.batches if batch.event.body.get("seconds")], 40)
    stages = [
        stage
        for stage in dict.fromkeys(s for group in groups for b in group for s in b.event.body["seconds"])
        if any(b.event.body["seconds"].get(stage, 0.0) >= 0.005 for group in groups for b in group)
    ]
    if not stages:
        return None
    counts = [sum(b.count("written") + b.count("failed") for b in group) for group in groups]
    x = tuple(float(group[-1].edits) for group in groups)
    series = tuple(
        Series(
            stage,
            x,
            tuple(
                sum(b.event.body["seconds"].get(stage, 0.0) for b in group) / max(1, n)
                for group, n in zip(groups, counts, strict=True)
            ),
            mark="bars",
            colour=number,
        )
        for number, stage in enumerate(stages)
    )
    return Figure(
        "seconds",
        "Time per edit",
        "Wall-clock seconds of each stage over the facts that were written in the batch; key statistics, scoring and "
        "health are not counted.",
        EDITS,
        Axis("seconds per edit", low=0.0),
        series,
    )


def neurons_figure(run: RunRecord) -> Figure | None:
    """Which neurons were chosen, layer by layer: for most prompts, for one, for both."""
    masks = [batch.per_layer("masks") for batch in run.batches]
    layers = sorted({layer for mask in masks for layer in mask})
    if not layers:
        return None
    per_layer = {layer: [mask[layer] for mask in masks if layer in mask] for layer in layers}
    kept = _mean_share(per_layer, lambda d: d["kept"])
    parts: tuple[tuple[str, tuple[Value, ...]], ...]
    details = [detail for found in per_layer.values() for detail in found]
    if all("kept_per_edit" in detail for detail in details):
        one = _mean_share(per_layer, lambda d: d["kept_per_edit"])
        others = _mean_share(per_layer, lambda d: d["kept"] - d["kept_per_edit"])
        parts = (("one edit of the batch", one), ("its other edits, beyond that", others))
        meaning = "Every edit has its own neurons; their masks overlap, and together they are the whole bar."
    elif run.config.get("mask") in ("entropy", "fixed") and all("overlap" in detail for detail in details):
        parts = (
            ("general only", _mean_share(per_layer, lambda d: d["general"] - d["overlap"])),
            ("general and specific", _mean_share(per_layer, lambda d: d["overlap"])),
            ("specific only", _mean_share(per_layer, lambda d: d["specific"] - d["overlap"])),
        )
        meaning = "General: high for most prompts of the batch; specific: very high for one."
    else:
        parts = ((f"chosen by mask {run.config.get('mask')!r}", kept),)
        meaning = "One mask for each batch."
    x = tuple(float(i) for i in range(len(layers)))
    series = tuple(Series(name, x, values, mark="bars", colour=i) for i, (name, values) in enumerate(parts))
    batches = max(len(found) for found in per_layer.values())
    return Figure(
        "neurons",
        "Neurons that may change, by layer",
        f"Share of the layer's neurons, mean over {counted(batches, 'batch', 'batches')}. {meaning} "
        "The columns of all other neurons stay bit-identical.",
        Axis("layer (of the decoder, counted from 0)", categories=tuple(map(str, layers))),
        Axis("share of the layer's neurons", low=0.0, high=1.0, percent=True),
        series,
    )


def use_figure(run: RunRecord) -> Figure | None:
    """In how many batches each neuron was written, against what chance would give."""
    layers = {layer: use for layer, use in run.use.items() if use.batches > 1}
    if not layers:
        return None
    most = max(use.batches for use in layers.values())
    edges = _edges(most)
    rows = [_share_between(use, edges) for use in layers.values()]
    chance = [_chance_between(use, edges) for use in layers.values()]
    expected = tuple(sum(row[i] for row in chance) / len(chance) for i in range(len(edges)))
    names = tuple(str(a) if a == b else f"{a}–{b}" for a, b in edges)
    return Figure(
        "neuron-use",
        "Do batches use the same neurons?",
        f"Share of a layer's neurons that were written by so many of {most} batches; the last row is what random "
        "choices of the same size would give. More at both ends than chance means that batches share neurons.",
        Axis("batches that wrote into the neuron", categories=names),
        Axis("layer", categories=(*(str(layer) for layer in layers), "chance")),
        heat=Heat((*rows, expected), "share of the layer's neurons", percent=True),
    )


def _edges(batches: int) -> list[tuple[int, int]]:
    """Counts 0 … batches in at most six groups."""
    width = max(1, math.ceil((batches + 1) / 6))
    return [(a, min(batches, a + width - 1)) for a in range(0, batches + 1, width)]


def _share_between(use: NeuronUse, edges: Sequence[tuple[int, int]]) -> tuple[Value, ...]:
    return tuple(float(((use.counts >= a) & (use.counts <= b)).double().mean()) for a, b in edges)


def _chance_between(use: NeuronUse, edges: Sequence[tuple[int, int]]) -> tuple[float, ...]:
    """The same if every batch had chosen as many neurons at random: a binomial with the mean share."""
    chosen = use.counts.double().mean() / use.batches
    counts = torch.arange(use.batches + 1, dtype=torch.float64)
    n = torch.tensor(float(use.batches), dtype=torch.float64)
    ways = torch.lgamma(n + 1) - torch.lgamma(counts + 1) - torch.lgamma(n - counts + 1)
    log_p = ways + torch.xlogy(counts, chosen) + torch.xlogy(n - counts, 1 - chosen)
    return tuple(float(log_p.exp()[a : b + 1].sum()) for a, b in edges)


def _mean_share(
    per_layer: dict[int, list[dict[str, float]]], count: Callable[[dict[str, float]], float]
) -> tuple[Value, ...]:
    """Per layer the mean over batches of a count over the layer's neurons."""
    return tuple(sum(count(d) / d["d_mlp"] for d in found) / len(found) for found in per_layer.values())


def _health(run: RunRecord, name: str) -> tuple[tuple[Value, ...], tuple[Value, ...]] | None:
    """Edits so far and a number of the health check, thinned to the last of each group."""
    looked = [group[-1] for group in _grouped([batch for batch in run.batches if batch.health])]
    if not looked:
        return None
    return tuple(float(batch.edits) for batch in looked), tuple(batch.health.get(name) for batch in looked)


def _limits(run: RunRecord, values: tuple[Value, ...], *limits: tuple[str, str]) -> tuple[Series, ...]:
    """The limits that the curve comes near to; far ones would flatten it."""
    highest = max((value for value in values if value is not None), default=0.0)
    config: dict[str, Any] = run.config
    return tuple(
        Series(name, (0.0,), (float(config[setting]),), mark="rule", colour=colour)
        for colour, (setting, name) in zip((4, 1), limits, strict=True)
        if setting in config and highest > config[setting] / 2
    )


def _grouped(batches: Sequence[Batch], most: int = MOST_POINTS) -> list[list[Batch]]:
    """Neighbouring batches together, so that no chart has more than so many points."""
    size = max(1, -(-len(batches) // most))
    return [list(batches[i : i + size]) for i in range(0, len(batches), size)]


def _ends(intervals: Sequence[tuple[float, float]]) -> tuple[tuple[Value, ...], tuple[Value, ...]]:
    return tuple(low for low, _ in intervals), tuple(high for _, high in intervals)
