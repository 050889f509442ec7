"""What the user sees: results on stdout, progress and messages on stderr, plain lines where nobody watches."""

from __future__ import annotations

import json
import math
import os
import sys
import textwrap
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from nmke.progress import Progress, Task

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as RichBar
    from rich.progress import TaskID
    from rich.table import Table

SECONDS_BETWEEN_LINES = 10.0
LABEL_WIDTH = 10
# A path or a command that is too long for the line is better left whole.
WRAPPING: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False}


def stdout() -> Console:
    """Where results go."""
    return _console(stderr=False)


def stderr() -> Console:
    """Where progress and messages go."""
    return _console(stderr=True)


def note(message: str, style: str = "dim") -> None:
    """One line on stderr."""
    stderr().print(printable(message), style=style, markup=False, highlight=False, soft_wrap=True)


def warn(message: str) -> None:
    """One line on stderr that should be read."""
    note(f"warning: {message}", "yellow")


def say(message: str = "", style: str | None = None) -> None:
    """One line of result on stdout."""
    stdout().print(printable(message), style=style, markup=False, highlight=False, soft_wrap=True)


def fact(label: str, text: str) -> None:
    """A labelled line of result; long text is wrapped behind the label."""
    from rich.text import Text

    console = stdout()
    room = max(20, console.width - LABEL_WIDTH)
    lines = [
        piece
        for line in printable(text).split("\n")
        for piece in textwrap.wrap(line, room, **WRAPPING) or [""]
    ]
    for number, line in enumerate(lines):
        head = Text(f"{label if number == 0 else '':<{LABEL_WIDTH}}", style="bold cyan")
        console.print(head.append(line, style="not bold default"), soft_wrap=True)


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[str] = ()) -> None:
    """A table on stdout that folds to the terminal's width."""
    stdout().print(make_table(columns, rows, right=right))


def make_table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[str] = ()) -> Table:
    """The table itself; columns named in `right` hold numbers."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    made = Table(box=box.SIMPLE, pad_edge=False, header_style="bold")
    for name in columns:
        made.add_column(
            name, justify="right" if name in right else "left", overflow="fold", no_wrap=name in right
        )
    for row in rows:
        made.add_row(*(Text(printable(cell)) for cell in row))
    return made


def printable(text: str) -> str:
    """The text without control characters, which a model or a file could steer the terminal with."""
    return "".join(c if c.isprintable() or c == "\n" else " " if c.isspace() else "\ufffd" for c in text)


def print_json(content: Mapping[str, Any]) -> None:
    """One JSON object on stdout; numbers that are not finite become null."""
    sys.stdout.write(json.dumps(_finite(content), indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    sys.stdout.flush()


def is_lively() -> bool:
    """Whether stderr is a terminal that moving bars can be drawn on."""
    return sys.stderr.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


class Display(Progress, Protocol):
    """Progress that can also print lines that stay."""

    def line(self, text: str) -> None:
        """A line that stays, above what moves."""
        ...


def progress() -> Display:
    """Bars on a terminal, now and then a plain line elsewhere."""
    if is_lively():
        return Bars()
    return Lines()


@contextmanager
def working(what: str) -> Iterator[None]:
    """Say on stderr what is going on while it does."""
    if is_lively():
        with stderr().status(f"{what} …"):
            yield
    else:
        note(f"{what} …")
        yield


@dataclass
class Bars:
    """Progress drawn by rich; nested tasks share one display, which goes away when the outermost ends."""

    _shown: RichBar | None = None

    @contextmanager
    def task(self, title: str, total: float) -> Iterator[Task]:
        """A bar."""
        outermost = self._shown is None
        if self._shown is None:
            self._shown = _rich_bar()
            self._shown.start()
        bar = self._shown
        number = bar.add_task(title, total=total, note="")
        try:
            yield _BarTask(bar, number)
        finally:
            bar.remove_task(number)
            if outermost:
                bar.stop()
                self._shown = None

    def line(self, text: str) -> None:
        """A line that stays, above the bars."""
        (self._shown.console if self._shown else stderr()).print(
            printable(text), markup=False, highlight=False, soft_wrap=True
        )


@dataclass(frozen=True)
class _BarTask:
    bar: RichBar
    number: TaskID

    def advance(self, steps: float = 1, note: str = "") -> None:
        self.bar.update(self.number, advance=steps, note=note)


@dataclass
class Lines:
    """Progress as plain lines: a task that takes long says so every few seconds."""

    @contextmanager
    def task(self, title: str, total: float) -> Iterator[Task]:
        """A task that prints a line now and then."""
        running = _LineTask(title, total)
        yield running
        if running.spoke:
            note(f"{title}: done in {time.monotonic() - running.begun:.0f} s")

    def line(self, text: str) -> None:
        """A line."""
        note(text)


@dataclass
class _LineTask:
    title: str
    total: float
    done: float = 0.0
    begun: float = field(default_factory=time.monotonic)
    last: float = field(default_factory=time.monotonic)
    spoke: bool = False

    def advance(self, steps: float = 1, note: str = "") -> None:
        self.done += steps
        now = time.monotonic()
        if now - self.last >= SECONDS_BETWEEN_LINES and self.done < self.total:
            self.last, self.spoke = now, True
            left = (now - self.begun) * (self.total - self.done)
            about = f", about {left / self.done:.0f} s left" if self.done else ""
            _note_line(f"{self.title}: {self.done:g} of {self.total:g}{about}", note)


def _note_line(text: str, extra: str) -> None:
    note(f"{text} ({extra})" if extra else text)


def _rich_bar() -> RichBar:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Progress as RichBar

    return RichBar(
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[note]}", style="dim"),
        console=stderr(),
        transient=True,
    )


def _console(*, stderr: bool) -> Console:
    from rich.console import Console

    return Console(stderr=stderr)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(name): _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
