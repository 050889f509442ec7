"""The History tab: every edit with search, the health of the model over time, undo, revert, retry and diff."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from nmke.cli.diff import differences, read_state
from nmke.errors import NmkeError
from nmke.events import Event
from nmke.ledger import Row
from nmke.studio.jobs import Job
from nmke.studio.pages.common import PRIVATE, follow, html, listed_edits, problem_html, say
from nmke.studio.service import Studio

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
        chosen = gr.Dropdown([], label="Edit", elem_id="chosen", scale=6, min_width=220)
        revert = gr.Button("Revert it", elem_id="revert", min_width=110)
        again = gr.Button("Retry it", elem_id="retry", min_width=110)
        steps = _number("Retry steps", "retry-steps", 50)
    with gr.Row():
        batches = _number("Newest batches", "batches", 1)
        undo = gr.Button("Undo them", elem_id="undo", min_width=110)
        states = [
            _number("Diff of: batches back", "back-a", 1, 0),
            _number("and: batches back", "back-b", 0, 0),
        ]
        compare = gr.Button("Show diff", elem_id="diff", min_width=110)
    result = gr.HTML(say("Choose an edit, or look at the newest batches."), elem_id="history-result")
    health = gr.HTML(elem_id="health")

    do = _Actions(studio)
    listed = [table, chosen, older, last, health]
    for trigger in (search.submit, state.input, refresh.click, tab.select):
        trigger(do.show, [search, state], listed, show_progress="hidden", **PRIVATE)
    older.click(do.show, [search, state, last], listed, show_progress="hidden", **PRIVATE)
    outputs = [result, *listed]
    revert.click(do.revert, [chosen, search, state], outputs, show_progress="hidden", **PRIVATE)
    again.click(do.retry, [chosen, steps, search, state], outputs, show_progress="hidden", **PRIVATE)
    undo.click(do.undo, [batches, search, state], outputs, show_progress="hidden", **PRIVATE)
    compare.click(do.diff, states, result, show_progress="hidden", **PRIVATE)


def _number(label: str, name: str, value: int, least: int = 1) -> gr.Number:
    return gr.Number(value, label=label, precision=0, minimum=least, min_width=120, elem_id=name)


@dataclass(frozen=True)
class _Actions:
    """What the tab's buttons do."""

    studio: Studio

    def show(self, text: str, state: str, before: Row | None = None) -> tuple[Any, ...]:
        status = None if state == "any" else state
        at = tuple(before) if before else None
        places = self.studio.edits(text or "", status, PAGE, at)  # type: ignore[arg-type]
        newest = places[0].record.request.id if places else None
        return (
            html("history.html", places=places, filtered=bool(text or status)),
            gr.update(choices=listed_edits(places), value=newest),
            gr.update(visible=len(places) == PAGE),
            list(places[-1].at) if len(places) == PAGE else None,
            health_html(self.studio.batches(CHARTED)),
        )

    def revert(self, name: str | None, text: str, state: str) -> Iterator[tuple[Any, ...]]:
        yield from self._write(lambda: self.studio.submit_revert(name or ""), text, state)

    def retry(self, name: str | None, steps: float, text: str, state: str) -> Iterator[tuple[Any, ...]]:
        settings = {"steps": int(steps or 1)}
        yield from self._write(lambda: self.studio.submit_retry(name or "", settings), text, state)

    def undo(self, count: float, text: str, state: str) -> Iterator[tuple[Any, ...]]:
        yield from self._write(lambda: self.studio.submit_undo(int(count or 1)), text, state)

    def _write(self, submit: Callable[[], Job], text: str, state: str) -> Iterator[tuple[Any, ...]]:
        nothing = (gr.skip(),) * 5
        try:
            for shown in follow(submit()):
                yield (shown, *nothing)
        except NmkeError as error:
            yield (problem_html(error), *nothing)
            return
        yield (gr.skip(), *self.show(text, state))

    def diff(self, first: float, second: float) -> str:
        try:
            a, b = (read_state(f"{self.studio.root}~{int(back or 0)}") for back in (first, second))
            names = [f"{int(back or 0)} batches back" if back else "head" for back in (first, second)]
            same = a.content_hash == b.content_hash
            return html("diff.html", rows=differences(a, b), names=names, same=same)
        except NmkeError as error:
            return problem_html(error)


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
