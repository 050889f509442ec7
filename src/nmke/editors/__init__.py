"""Methods that turn requests into weight updates."""

from nmke.editors import alphaedit as alphaedit
from nmke.editors import memit as memit
from nmke.editors import nmke as nmke
from nmke.editors import rome as rome
from nmke.editors.method import Method, Solver, methods

__all__ = ["Method", "Solver", "methods"]
