"""Colours that people with any kind of colour vision tell apart, on white and on a dark ground.

Shapes, dashes and legends say the same, so that no chart hangs on colour alone. Source: adapted from the palette of
Okabe and Ito (2008), moved apart until simulated colour blindness of any kind told all of them apart (see the tests).
"""

from __future__ import annotations

LIGHT = ("#0072b2", "#b94505", "#12a150", "#be6885", "#69140b", "#373764")
DARK = ("#5cb8f2", "#ff9153", "#2fdc9b", "#f9bad2", "#f2ee78", "#7d8f98")
# The ordered scale: light to dark by day, dark to light by night, so that more always stands out more.
RAMP_LIGHT = ("#b9d3ea", "#08306b")
RAMP_DARK = ("#27415f", "#d7ecff")
GROUND_LIGHT, GROUND_DARK = "#ffffff", "#14171c"
DASHES = ("", "6 3", "2 2", "8 3 2 3", "1 3", "10 4")


def mixed(colour: float, ramp: tuple[str, str] = RAMP_LIGHT) -> str:
    """The ordered scale at `colour` in [0, 1], as #rrggbb."""
    ends = [[int(end[i : i + 2], 16) for i in (1, 3, 5)] for end in ramp]
    return "#" + "".join(f"{round(a + (b - a) * colour):02x}" for a, b in zip(*ends, strict=True))


def chosen(colour: int | float, colours: tuple[str, ...] = LIGHT) -> str:
    """A series' colour as #rrggbb, for a light ground unless other colours are given."""
    return mixed(colour) if isinstance(colour, float) else colours[colour % len(colours)]
