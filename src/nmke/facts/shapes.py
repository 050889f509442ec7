"""The record shapes we know, recognised by their fields, each turned into an `EditCase`.

Our own shape is strict: an unknown field or a fact that cannot be edited is an error. In the published data
sets such a fact is skipped and counted in a note, and fields we do not use are listed in a note.
"""

from __future__ import annotations

from nmke.errors import ConfigError, unknown_name
from nmke.facts.plain_shapes import EASYEDIT, KNOWEDIT, OWN, OWN_FIELDS, WIKIBIGEDIT, ZSRE
from nmke.facts.record import Record
from nmke.facts.rewrite_shapes import COUNTERFACT, MQUAKE, PEAK
from nmke.facts.shape import Shape
from nmke.facts.triple_shapes import CONFLICT, KNOWN, ROUND

# Looked through in this order: a shape whose fields are a part of another's comes after it, our own last.
SHAPES = (MQUAKE, PEAK, COUNTERFACT, CONFLICT, ROUND, KNOWN, ZSRE, KNOWEDIT, WIKIBIGEDIT, EASYEDIT, OWN)


def find_shape(record: Record, name: str | None = None) -> Shape:
    """The shape asked for by name, or the one whose fields the record has.

    Raises:
        ConfigError: If the name is unknown.
        RequestError: If no shape fits the record.
    """
    if name is not None:
        for shape in SHAPES:
            if shape.name == name:
                return shape
        raise ConfigError(unknown_name("facts shape", name, [shape.name for shape in SHAPES]))
    for shape in SHAPES:
        if shape.signs & record.data.keys():
            return shape
    stray = next((name for name in record.data if name not in OWN_FIELDS), "prompt")
    hint = unknown_name("field", stray[:40], OWN_FIELDS)
    raise record.error(stray[:40], f"no known shape of record; ours needs 'prompt' and 'target_new'; {hint}")
