"""A report: what it says as data, and the one self-contained HTML file made of it.

The file holds its style, its charts as inline SVG and its data; it has no script and asks no other host for
anything, which its content security policy also forbids.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import resources
from typing import Any, Literal

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from nmke.errors import ExportError
from nmke.viz.figures import Figure
from nmke.viz.svg import draw, swatch

SCHEMA = "nmke.report/1"
LARGEST_FILE = 5_000_000  # bytes of the HTML file
LARGEST_DOWNLOAD = 1_000_000  # bytes of a file held inside it
MARKS = {"good": "✓", "bad": "✗"}
Kind = Literal["text", "number", "code", "good", "bad", "quiet"]


@dataclass(frozen=True)
class Cell:
    """One cell of a table; `kind` decides how it looks."""

    text: str
    kind: Kind = "text"


@dataclass(frozen=True)
class Table:
    """A table.

    Args:
        id: Its name, and that of its CSV file.
        columns: Heads.
        rows: Cells, one per column; plain texts are cells too.
        title: Line above it.
        note: How to read it.
        folded: Shown only when it is opened.
    """

    id: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell | str, ...], ...]
    title: str = ""
    note: str = ""
    folded: bool = False

    def cells(self) -> Iterator[list[Cell]]:
        """The rows, every entry a cell."""
        for row in self.rows:
            yield [cell if isinstance(cell, Cell) else Cell(cell) for cell in row]

    def plain_rows(self) -> list[dict[str, str]]:
        """One object per row, by column."""
        return [dict(zip(self.columns, (cell.text for cell in row), strict=True)) for row in self.cells()]


@dataclass(frozen=True)
class Download:
    """A file that belongs to the report; carried inside it unless it is large."""

    name: str
    content: str
    kind: str = "text/plain"

    @property
    def fits(self) -> bool:
        """Whether it is small enough to be carried inside the HTML file."""
        return len(self.content.encode()) <= LARGEST_DOWNLOAD

    @property
    def address(self) -> str:
        """It as a `data:` address."""
        return f"data:{self.kind};charset=utf-8;base64," + base64.b64encode(self.content.encode()).decode()


@dataclass(frozen=True)
class Section:
    """A part of the report.

    Args:
        id: Its anchor.
        title: Its heading.
        text: Paragraphs.
        tables: Below them.
        figures: Below those.
        commands: Lines to type.
        downloads: Files that belong to it.
    """

    id: str
    title: str
    text: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    figures: tuple[Figure, ...] = ()
    commands: tuple[str, ...] = ()
    downloads: tuple[Download, ...] = ()


@dataclass(frozen=True)
class Report:
    """Everything a report says.

    Args:
        title: Its name.
        lead: What it is about, one sentence.
        notice: What a reader must know first, "" for nothing.
        tiles: Few numbers that matter: label, value, remark.
        sections: Its parts.
        made: When and with what.
        about: The rest of the record, for JSON.
    """

    title: str
    lead: str
    notice: str
    tiles: tuple[tuple[str, str, str], ...]
    sections: tuple[Section, ...]
    made: str
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def figures(self) -> list[Figure]:
        """Every figure, in order."""
        return [figure for section in self.sections for figure in section.figures]

    @property
    def tables(self) -> list[Table]:
        """Every table, in order."""
        return [table for section in self.sections for table in section.tables]


def render(report: Report) -> str:
    """The report as one HTML file.

    Raises:
        ExportError: If it would be larger than 5 MB.
    """
    environment = Environment(
        loader=PackageLoader("nmke.viz"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style = resources.files("nmke.viz").joinpath("templates/report.css").read_text(encoding="utf-8")
    html = environment.get_template("report.html.j2").render(
        report=report, style=Markup(style), draw=_drawn, swatch=_swatch, clean=clean, marks=MARKS
    )
    size = len(html.encode())
    if size > LARGEST_FILE:
        raise ExportError(
            f"the report would have {size / 1e6:.1f} MB, at most {LARGEST_FILE / 1e6:.0f} are meant to be; "
            "take its parts with --format csv or json"
        )
    return html


def clean(text: str) -> str:
    """The text without characters that HTML cannot hold or that would reorder the page's own words."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


def _drawn(figure: Figure) -> Markup:
    return Markup(draw(figure))


def _swatch(figure: Figure, number: int) -> Markup:
    return Markup(swatch(figure.series[number], number))
