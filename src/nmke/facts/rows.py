"""Files to rows: JSON lines, a JSON array or CSV, gzip or not, streamed, every fault with its line.

What a file is, is read from its first bytes and never from its name.
"""

from __future__ import annotations

import csv
import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from nmke.errors import RequestError
from nmke.facts.json_array import array_rows
from nmke.facts.json_text import MAX_RECORD, Row, load_object

_BOM = b"\xef\xbb\xbf"
_SNIFF = 4096
Faults = list[RequestError] | None


@contextmanager
def open_rows(path: Path, faults: Faults = None) -> Iterator[tuple[str, Iterator[Row]]]:
    """The file's format ("jsonl", "json" or "csv") and its rows, read one at a time.

    Args:
        path: The file.
        faults: Takes the faults of lines that can be left out, which are then left out; None raises them.

    Raises:
        RequestError: If the file is missing, unreadable, damaged, not UTF-8 or of no known format.
    """
    try:
        if not path.is_file():
            kind = "not a regular file" if path.exists() else "no such file"
            raise RequestError(f"facts file {str(path)!r}: {kind}; give a JSONL, JSON or CSV file")
        with path.open("rb") as raw:
            stream = _unzipped(raw) if raw.peek(2)[:2] == b"\x1f\x8b" else raw
            if stream.peek(3)[:3] == _BOM:
                stream.read(3)
            form = _format(stream, path)
            yield form, _READERS[form](stream, str(path), faults)
    except (OSError, EOFError, zlib.error) as error:
        raise RequestError(
            f"facts file {str(path)!r} cannot be read: {error}; check or fetch it again"
        ) from error


def _unzipped(raw: io.BufferedReader) -> io.BufferedReader:
    return io.BufferedReader(cast("io.RawIOBase", gzip.GzipFile(fileobj=raw)))


def _format(stream: io.BufferedReader, path: Path) -> str:
    """The format, from the first character that is not a space."""
    head = stream.peek(_SNIFF)[:_SNIFF]
    if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise RequestError(f"{path}, line 1: the file is UTF-16; save it as UTF-8")
    start = head.lstrip()[:1]
    if start in (b"{", b"["):
        return "jsonl" if start == b"{" else "json"
    if b"," in head.lstrip().partition(b"\n")[0]:
        return "csv"
    if not start:
        return "jsonl"
    found = head.lstrip()[:40].decode("utf-8", "replace")
    raise RequestError(
        f"{path}, line 1: {found!r} begins neither a JSON record nor a CSV header; "
        "write one JSON object per line, a JSON array, or a CSV with columns prompt,subject,target_new"
    )


def _lines(stream: io.BufferedReader, source: str) -> Iterator[tuple[int, str]]:
    """Numbered lines as text, with their line ends."""
    number = 0
    while raw := stream.readline(MAX_RECORD + 1):
        number += 1
        if len(raw) > MAX_RECORD:
            raise RequestError(f"{source}, line {number}: longer than {MAX_RECORD:,} bytes; split the record")
        try:
            yield number, raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise RequestError(
                f"{source}, line {number}: byte {error.start} (0x{raw[error.start]:02x}) is not UTF-8; "
                "save the file as UTF-8"
            ) from error


def _json_lines(stream: io.BufferedReader, source: str, faults: Faults) -> Iterator[Row]:
    for number, text in _lines(stream, source):
        if text.strip():
            try:
                row = Row(number, load_object(text, source, number))
            except RequestError as fault:
                _keep(fault, faults)
            else:
                yield row


def _json_array(stream: io.BufferedReader, source: str, _faults: Faults) -> Iterator[Row]:
    yield from array_rows(stream, source)


def _keep(fault: RequestError, faults: Faults) -> None:
    if faults is None:
        raise fault
    faults.append(fault)


def _csv_rows(stream: io.BufferedReader, source: str, faults: Faults) -> Iterator[Row]:
    reader = csv.reader((text for _, text in _lines(stream, source)), strict=True)
    header: list[str] = []
    line = 0
    try:
        for cells in reader:
            line += 1
            if not any(cell.strip() for cell in cells):
                pass
            elif not header:
                header = _header(cells, source, line)
            elif len(cells) != len(header):
                fault = RequestError(
                    f"{source}, line {line}: {len(cells)} cells, but the header names {len(header)} columns; "
                    "put texts that hold a comma in double quotes"
                )
                _keep(fault, faults)
            else:
                yield Row(line, _cells(header, cells))
            line = reader.line_num
    except csv.Error as error:
        raise RequestError(
            f"{source}, line {reader.line_num}: broken CSV ({error}); check the quotes"
        ) from error


def _header(cells: list[str], source: str, line: int) -> list[str]:
    names = [cell.strip() for cell in cells]
    if len(set(names)) != len(names):
        raise RequestError(f"{source}, line {line}: a column name stands twice in {names[:12]}; rename one")
    if "prompt" not in names:
        raise RequestError(
            f"{source}, line {line}: no column 'prompt' among {[name[:40] for name in names[:12]]}; "
            "name columns out of id,prompt,subject,target_new,target_true,relation,paraphrases"
        )
    return names


def _cells(header: list[str], cells: list[str]) -> dict[str, Any]:
    """A CSV row as a record: blank cells of optional columns are left out, paraphrases are parted at `|`."""
    data: dict[str, Any] = {}
    for name, cell in zip(header, cells, strict=True):
        if name == "paraphrases":
            data[name] = [part.strip() for part in cell.split("|") if part.strip()]
        elif cell.strip() or name in ("prompt", "target_new"):
            data[name] = cell
    return data


_READERS = {"jsonl": _json_lines, "json": _json_array, "csv": _csv_rows}
