"""Facts files: read what to edit, in our own shape or in a known one, with one clear error per fault."""

from nmke.facts.locate import bundled_facts, data_path, downloads
from nmke.facts.prompts import parse_prompt
from nmke.facts.reader import FactsFile, find_faults, read_facts

__all__ = [
    "FactsFile",
    "bundled_facts",
    "data_path",
    "downloads",
    "find_faults",
    "parse_prompt",
    "read_facts",
]
