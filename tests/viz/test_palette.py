"""The palettes hold for eyes of every kind: enough contrast, and no two colours that look alike."""

import itertools
import re
from importlib import resources

import numpy as np
import pytest

from nmke.viz.palette import DARK, GROUND_DARK, GROUND_LIGHT, LIGHT, RAMP_DARK, RAMP_LIGHT, chosen, mixed

# Simulation of complete colour blindness of each kind in linear RGB. Source: Machado, Oliveira, Fernandes 2009.
EYES = {
    name: np.array(matrix).reshape(3, 3)
    for name, matrix in {
        "normal": [1, 0, 0, 0, 1, 0, 0, 0, 1],
        "protanopia": [
            0.152286, 1.052583, -0.204868, 0.114503, 0.786281, 0.099216, -0.003882, -0.048116, 1.051998,
        ],
        "deuteranopia": [
            0.367322, 0.860646, -0.227968, 0.280085, 0.672501, 0.047413, -0.011820, 0.042940, 0.968881,
        ],
        "tritanopia": [
            1.255528, -0.076749, -0.178779, -0.078411, 0.930809, 0.147602, 0.004733, 0.691367, 0.303900,
        ],
    }.items()
}  # fmt: skip
LEAST_CONTRAST = 3.0  # WCAG 2.2, 1.4.11, for graphics
LEAST_DIFFERENCE = 12.0  # CIE76; 2.3 can just be seen


def linear(colour: str) -> np.ndarray:
    rgb = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def contrast(first: str, second: str) -> float:
    a, b = sorted(float(linear(c) @ [0.2126, 0.7152, 0.0722]) for c in (first, second))
    return (b + 0.05) / (a + 0.05)


def lab(rgb: np.ndarray) -> np.ndarray:
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ rgb.clip(
        0, 1
    )
    f = [t ** (1 / 3) if t > 0.008856 else 7.787 * t + 16 / 116 for t in xyz / [0.95047, 1.0, 1.08883]]
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize(("colours", "ground"), [(LIGHT, GROUND_LIGHT), (DARK, GROUND_DARK)])
def test_every_colour_stands_out_from_its_ground(colours: tuple[str, ...], ground: str) -> None:
    assert min(contrast(colour, ground) for colour in colours) >= LEAST_CONTRAST


@pytest.mark.parametrize("eye", EYES)
@pytest.mark.parametrize("colours", [LIGHT, DARK])
def test_no_two_colours_look_alike(colours: tuple[str, ...], eye: str) -> None:
    seen = {colour: lab(EYES[eye] @ linear(colour)) for colour in colours}
    differences = {
        (a, b): float(np.linalg.norm(seen[a] - seen[b])) for a, b in itertools.combinations(colours, 2)
    }
    worst = min(differences, key=differences.__getitem__)
    assert differences[worst] >= LEAST_DIFFERENCE, (worst, differences[worst])


@pytest.mark.parametrize(("ramp", "ground"), [(RAMP_LIGHT, GROUND_LIGHT), (RAMP_DARK, GROUND_DARK)])
def test_the_ordered_scale_stands_out_more_and_more(ramp: tuple[str, str], ground: str) -> None:
    steps = [contrast(mixed(i / 10, ramp), ground) for i in range(11)]
    assert steps == sorted(steps) and steps[-1] / steps[0] > 4


def test_the_style_sheet_holds_the_same_colours() -> None:
    css = resources.files("nmke.viz").joinpath("templates/report.css").read_text(encoding="utf-8")
    light, dark = css.split("prefers-color-scheme: dark", 1)
    for part, colours, ramp, ground in (
        (light, LIGHT, RAMP_LIGHT, GROUND_LIGHT),
        (dark, DARK, RAMP_DARK, GROUND_DARK),
    ):
        found = dict(re.findall(r"--([a-z0-9-]+): (#[0-9a-f]{6});", part.split("* {", 1)[0]))
        assert tuple(found[f"s{i}"] for i in range(6)) == colours
        assert (found["ramp-0"], found["ramp-1"], found["ground"]) == (*ramp, ground)
        assert min(contrast(found[name], ground) for name in ("ink", "soft", "accent", "good", "bad")) >= 4.5


def test_colours_by_number_and_on_the_scale() -> None:
    assert chosen(0) == LIGHT[0] == chosen(6)
    assert (chosen(0.0), chosen(1.0)) == RAMP_LIGHT
    assert mixed(0.5, ("#000000", "#ffffff")) == "#808080"
