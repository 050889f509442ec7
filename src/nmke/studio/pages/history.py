"""The History tab: every edit with search, the health of the model over time, undo, revert, retry and diff."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import gradio as gr

from nmke.cli.diff import differences, read_state
from nmke.errors import NmkeError
from nmke.events import Event
from nmke.ledger import Row
from nmke.studio.pages.common import PRIVATE, follow, html, problem_html, say
from nmke.studio.service import Place, Studio

PAGE = 50
CHARTED = 200  # batches
STATES = ["any", "written", "failed", "known"]


def build(studio: Studio, tab: gr.Tab) -> None:
    """Put the tab's parts on the page."""
    with gr.Row():
        search = gr.Textbox(label="Search prompt, answer or id", elem_id="search", scale=3, min_width=200)
        state = gr.Dropdown(STATES, value="any", label="State", elem_id="state", min_width=120)
        refresh = gr.Button("Refresh", elem_id="refresh", min_width=100)
    table = gr.HTML(elem_id="history-table")
    older = gr.Button("Older edits", visible=False, size="sm", elem_id="older")
    last = gr.State(None)
    with gr.Row():
        chosen = gr.Dropdown([], label="Edit", elem_id="chosen", scale=3, min_width=220)
        revert = gr.Button("Revert it", elem_id="revert", min_width=110)
        again = gr.Button("Retry it", elem_id="retry", min_width=110)
        steps = gr.Number(
            50, label="Steps of a retry", precision=0, minimum=1, min_width=120, elem_id="retry-steps"
        )
    with gr.Row():
        batches = gr.Number(
            1, label="Newest batches", precision=0, minimum=1, min_width=120, elem_id="batches"
        )
        undo = gr.Button("Undo them", elem_id="undo", min_width=110)
        from_head = gr.Number(
            1, label="Diff of: batches back", precision=0, minimum=0, min_width=120, elem_id="back-a"
        )
        with_head = gr.Number(
            0, label="and: batches back", precision=0, minimum=0, min_width=120, elem_id="back-b"
        )
        compare = gr.Button("Show diff", elem_id="diff", min_width=110)
    result = gr.HTML(say("Choose an edit, or look at the newest batches."), elem_id="history-result")
    health = gr.HTML(elem_id="health")

    def show(text: str, state: str, before: Row | None = None) -> tuple[Any, ...]:
        status = None if state == "any" else state
        places = studio.edits(text or "", status, PAGE, tuple(before) if before else None)  # type: ignore[arg-type]
        newest = places[0].record.request.id if places else None
        return (
            html("history.html", places=places, filtered=bool(text or status)),
            gr.update(choices=_choices(places), value=newest),
            gr.update(visible=len(places) == PAGE),
            list(places[-1].at) if len(places) == PAGE else None,
            health_html(studio.batches(CHARTED)),
        )

    def write(job: Any, text: str, state: str) -> Iterator[tuple[Any, ...]]:
        nothing = (gr.skip(),) * 5
        try:
            for shown in follow(job()):
                yield (shown, *nothing)
        except NmkeError as error:
            yield (problem_html(error), *nothing)
            return
        yield (gr.skip(), *show(text, state))

    def take_back(name: str | None, text: str, state: str) -> Iterator[tuple[Any, ...]]:
        yield from write(lambda: studio.submit_revert(name or ""), text, state)

    def try_again(name: str | None, steps: float, text: str, state: str) -> Iterator[tuple[Any, ...]]:
        settings = {"steps": int(steps or 1)}
        yield from write(lambda: studio.submit_retry(name or "", settings), text, state)

    def undo_batches(count: float, text: str, state: str) -> Iterator[tuple[Any, ...]]:
        yield from write(lambda: studio.submit_undo(int(count or 1)), text, state)

    def show_diff(first: float, second: float) -> str:
        try:
            a, b = (read_state(f"{studio.root}~{int(back or 0)}") for back in (first, second))
            names = [f"{int(back or 0)} batches back" if back else "head" for back in (first, second)]
            return html(
                "diff.html", rows=differences(a, b), names=names, same=a.content_hash == b.content_hash
            )
        except NmkeError as error:
            return problem_html(error)

    listed = [table, chosen, older, last, health]
    for trigger in (search.submit, state.input, refresh.click, tab.select):
        trigger(show, [search, state], listed, show_progress="hidden", **PRIVATE)
    older.click(show, [search, state, last], listed, show_progress="hidden", **PRIVATE)
    outputs = [result, *listed]
    revert.click(take_back, [chosen, search, state], outputs, show_progress="hidden", **PRIVATE)
    again.click(try_again, [chosen, steps, search, state], outputs, show_progress="hidden", **PRIVATE)
    undo.click(undo_batches, [batches, search, state], outputs, show_progress="hidden", **PRIVATE)
    compare.click(show_diff, [from_head, with_head], result, show_progress="hidden", **PRIVATE)


def _choices(places: Sequence[Place]) -> list[tuple[str, str]]:
    return [
        (f"{place.record.request.id}  {place.record.request.text} → {place.record.request.target_new}", name)
        for place in places
        for name in [place.record.request.id]
    ]


def health_html(events: Sequence[Event]) -> str:
    """The model's health after each batch, as charts; "" before the first."""
    looked = [(event, event.body["health"]) for event in events if event.body.get("health")]
    if not looked:
        return ""
    limits = looked[-1][0].body["config"]
    charts = [
        _chart("KL to the unedited model, nats", [h["kl"] for _, h in looked], limits, "kl"),
        _chart(
            "perplexity, in units of the unedited model's",
            [h["perplexity"] and h["perplexity"] / h["perplexity_base"] for _, h in looked],
            limits,
            "perplexity",
        ),
        _chart("retention of earlier edits", [h["retention"] for _, h in looked], limits, "retention"),
    ]
    return html(
        "health.html", charts=charts, status=looked[-1][1]["status"], reasons=looked[-1][1]["reasons"]
    )


def _chart(title: str, values: Sequence[float | None], limits: dict[str, Any], name: str) -> dict[str, Any]:
    """Points of a chart, scaled to [0, 1]: 0 below, 1 at the stop limit or the largest value."""
    warn, stop = limits[f"{name}_warn"], limits[f"{name}_stop"]
    finite = [value for value in values if value is not None]
    top = max([*finite, warn * 1.2, 1e-9]) if name != "retention" else 1.0
    points = [(i, value / top) for i, value in enumerate(values) if value is not None]
    lines = {"limit": warn / top, "stop": stop / top}
    return {
        "title": title,
        "points": points,
        "count": len(values),
        "now": finite[-1] if finite else None,
        "top": top,
        "lines": {kind: at for kind, at in lines.items() if at <= 1},
    }
