"""Objects of a JSON array, one at a time: the text is held in a window that slides, never as a whole."""

from __future__ import annotations

import codecs
import io
import json
from collections.abc import Iterator
from typing import Any

from nmke.errors import RequestError
from nmke.facts.json_text import DECODER, MAX_RECORD, Row, broken_json, not_an_object

_CHUNK = 2**16
_SPACE = " \t\r\n"


def array_rows(stream: io.BufferedReader, source: str) -> Iterator[Row]:
    """The objects of the array, with the line on which each begins.

    Raises:
        RequestError: If the text is not UTF-8, not a JSON array, or holds something that is no object.
    """
    window = _Window(stream, source)
    window.take("[")
    if window.peek() == "]":
        window.take("]")
    else:
        yield window.take_object()
        while window.peek() == ",":
            window.take(",")
            yield window.take_object()
        window.take("]")
    if window.peek():
        raise window.error("text behind the end of the array; remove it")


class _Window:
    """Decoded text from the current place on; grows on demand, forgets what was read."""

    def __init__(self, stream: io.BufferedReader, source: str) -> None:
        self._stream, self._source = stream, source
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._text, self._at = "", 0
        self._line = 1

    def peek(self) -> str:
        """The next character that is not a space, "" at the end of the file."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in _SPACE:
                self._line += self._text[self._at] == "\n"
                self._at += 1
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._grow():
                return ""

    def take(self, sign: str) -> None:
        """Step over one sign that must come next."""
        found = self.peek()
        if found != sign:
            raise self.error(
                f"found {found!r} where {sign!r} must stand" if found else f"ends before {sign!r}"
            )
        self._at += 1

    def take_object(self) -> Row:
        """The object that must come next."""
        if self.peek() != "{":
            raise not_an_object(self._source, self._line, self._text[self._at : self._at + 40])
        data, end = self._decode()
        row = Row(self._line, data)
        self._line += self._text.count("\n", self._at, end)
        self._at = end
        return row

    def error(self, message: str) -> RequestError:
        """The error for the current line."""
        return RequestError(f"{self._source}, line {self._line}: broken JSON array: {message}")

    def _decode(self) -> tuple[dict[str, Any], int]:
        while True:
            try:
                return DECODER.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                if not self._grow():
                    line = self._line + self._text.count("\n", self._at, error.pos)
                    raise broken_json(self._source, line, error) from error
            except (ValueError, RecursionError) as error:
                raise broken_json(self._source, self._line, error) from error

    def _grow(self) -> bool:
        """Read on, as much again as is waiting, so that retries stay cheap; False at the end."""
        waiting = self._text[self._at :]
        if len(waiting) > MAX_RECORD:
            raise self.error(
                f"a record is longer than {MAX_RECORD:,} characters; split it or mend its brackets"
            )
        raw = self._stream.read(max(_CHUNK, len(waiting)))
        try:
            more = self._decoder.decode(raw, final=not raw)
        except UnicodeDecodeError as error:
            raise self.error("a byte that is not UTF-8; save the file as UTF-8") from error
        self._text, self._at = waiting + more, 0
        return bool(raw)
