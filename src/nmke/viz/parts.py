"""A report's parts as files: every chart as PNG, every chart and table as CSV, or everything as one JSON object."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nmke.viz.figures import Figure, plain
from nmke.viz.report import SCHEMA, Report


def as_json(report: Report) -> dict[str, Any]:
    """Everything that the report says, numbers that are not finite as null."""
    content = {
        "schema": SCHEMA,
        "title": report.title,
        "made": report.made,
        "tiles": [dict(zip(("label", "value", "remark"), tile, strict=True)) for tile in report.tiles],
        "figures": {figure.id: figure.as_json() for figure in report.figures},
        "tables": {table.id: table.plain_rows() for table in report.tables},
        "about": report.about,
    }
    return dict(plain(content))


def csv_files(report: Report) -> dict[str, str]:
    """Content of one CSV file per chart and table, and of the files that belong to the report, by file name."""
    files = {f"figure-{figure.id}.csv": _csv(figure.rows()) for figure in report.figures}
    files |= {f"table-{table.id}.csv": _csv(table.plain_rows()) for table in report.tables}
    files |= {file.name: file.content for section in report.sections for file in section.downloads}
    return {name: text for name, text in files.items() if text}


def png_files(figures: Sequence[Figure]) -> dict[str, bytes]:
    """One PNG per chart, by file name.

    Raises:
        ConfigError: If matplotlib is not installed.
    """
    from nmke.viz.png import draw_png

    return {f"figure-{figure.id}.png": draw_png(figure) for figure in figures}


def write_files(folder: Path, files: Mapping[str, str | bytes]) -> list[Path]:
    """Write them into `folder`, each whole or not at all."""
    from nmke.models.cache import atomic_file

    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        with atomic_file(folder / name) as temporary:
            temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    return [folder / name for name in files]


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return ""
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _safe(value) for name, value in row.items()} for row in rows)
    return text.getvalue()


def _safe(value: Any) -> Any:
    """A text that a spreadsheet would run as a formula, as a text; NUL, which no reader takes, is replaced."""
    if not isinstance(value, str):
        return value
    text = value.replace("\x00", "\ufffd")
    return f"'{text}" if text[:1] in ("=", "+", "-", "@", "\t", "\r") else text
