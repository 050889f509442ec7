"""Docstrings are plain text with shapes and formulas; this keeps Markdown from reading links and emphasis into them.

`E[k kᵀ] [d_mlp, d_mlp]` is no link, and `z*` opens no emphasis. What stands in backticks is left alone.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

PAIR = re.compile(r"(\] ?)\[")
STAR = re.compile(r"(?<=\w)\*(?=[\s,.;:)=]|$)")


class PlainDocstrings(griffe.Extension):
    """Escapes what Markdown would misread in the docstring of every object."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called for each module, class, function and attribute."""
        if obj.docstring is not None:
            parts = obj.docstring.value.split("`")
            parts[::2] = [STAR.sub(r"\\*", PAIR.sub(r"\1\\[", part)) for part in parts[::2]]
            obj.docstring.value = "`".join(parts)
