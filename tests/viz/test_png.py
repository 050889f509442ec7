"""Charts as PNG files, where matplotlib is installed; a clear error where it is not."""

import struct
import sys
import zlib

import pytest
from tests.viz import pages
from tests.viz.test_neuron_page import record

from nmke.errors import ConfigError
from nmke.viz.charts import run_figures
from nmke.viz.figures import Figure
from nmke.viz.neuron_page import neuron_section
from nmke.viz.parts import png_files
from nmke.viz.png import draw_png
from nmke.viz.stability_charts import stability_figures

FIGURES = [
    *run_figures(pages.run()),
    *stability_figures(pages.stability()),
    *neuron_section(record()).figures[:2],
]


@pytest.mark.parametrize("figure", FIGURES, ids=lambda figure: figure.id)
def test_every_chart_becomes_a_picture_with_something_on_it(figure: Figure) -> None:
    pytest.importorskip("matplotlib")
    content = draw_png(figure)
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", content[16:24])
    assert width >= 800 and height >= 500
    data, at = b"", 8
    while at < len(content):
        size, kind = struct.unpack(">I4s", content[at : at + 8])
        data += content[at + 8 : at + 8 + size] if kind == b"IDAT" else b""
        at += 12 + size
    assert len(set(zlib.decompress(data))) > 20, "more than a blank page"


def test_names_of_the_files() -> None:
    pytest.importorskip("matplotlib")
    assert list(png_files(FIGURES[:2])) == [f"figure-{figure.id}.png" for figure in FIGURES[:2]]


def test_missing_matplotlib_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    with pytest.raises(ConfigError, match=r"pip install 'nmke\[report\]'"):
        draw_png(FIGURES[0])
