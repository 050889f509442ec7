"""The part on a record of `nmke neurons`: a map of all layers, and what is wrong with a damaged record."""

import json
from pathlib import Path
from typing import Any

import pytest

from nmke.errors import RequestError
from nmke.viz.neuron_page import neuron_section, read_neurons


def record() -> dict[str, Any]:
    layers = [0, 1, 2]
    profile = {
        "layers": layers, "counts": [1, 1, 2], "shares": [0.25, 0.25, 0.5], "low": [0.1, 0.1, 0.3],
        "high": [0.4, 0.4, 0.7],
        "centre": [0.625, 0.5, 0.7], "top_third": [0.5, 0.3, 0.7], "evenness": 0.9,
    }  # fmt: skip
    rows = [
        {"layer": layer, "d_mlp": 64, "general": 20, "specific": 12, "overlap": 4, "kept": 28, "general_entropy": 0.9,
         "specific_entropy": 0.7}
        for layer in layers
    ]  # fmt: skip
    metric = {
        "unit": "nats", "summary": "what it measures", "source": "a paper", "seconds": 1.0, "layers": rows,
        "over_all_layers": {"neurons": 4, "overlap": [0, 1, 1], "general": profile, "specific": profile},
    }  # fmt: skip
    neuron = {
        "layer": 2, "neuron": 7, "kinds": ["general"], "scores": {"lps": {"mean": 0.1, "max": 0.5, "min": 0.0}},
        "promotes": [{"token": " Paris", "logit": 1.0}], "promotes_when_negative": [],
        "excited_by": [{"text": "The capital of France is", "token": " France", "coefficient": 2.0}],
    }  # fmt: skip
    return {
        "schema": "nmke.neurons/1",
        "model": {"name": "tiny", "source": "tiny", "n_layers": 3, "d_model": 32, "d_mlp": [64] * 3,
                  "edited_layers": [0, 1]},
        "settings": {"token": "last", "target": "predicted", "share": 0.01},
        "facts": [{"id": "e1", "prompt": "p", "subject": "s"}],
        "prompts": [{"fact": "e1", "text": "p", "bare": True, "token": " s", "target": " t"}],
        "metrics": {"lps": metric, "mpc": metric},
        "neurons": [neuron],
    }  # fmt: skip


def test_the_map_has_a_row_for_each_metric_and_kind() -> None:
    section = neuron_section(record())
    figures = {figure.id: figure for figure in section.figures}
    assert set(figures) == {"neuron-map", "neuron-sets", "neuron-entropy", "depth-lps", "depth-mpc"}
    shown = figures["neuron-map"]
    assert shown.heat is not None and shown.x.categories == ("0", "1", "2")
    assert (
        shown.y.categories[:3] == ("lps, general", "lps, specific", "lps, both")
        and len(shown.y.categories) == 6
    )
    assert shown.heat.values[0] == (0.25, 0.25, 0.5) and shown.heat.values[2] == (0.0, 0.25, 0.25)
    general = figures["depth-lps"].series[0]
    assert general.low == (0.1, 0.1, 0.3) and general.name == "general (centre 0.62)"
    assert [series.y[0] for series in figures["neuron-sets"].series] == [0.25, 4 / 64, 8 / 64]
    assert "' Paris'" in [cell.text for row in section.tables[0].cells() for cell in row]


def test_a_record_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    path = tmp_path / "neurons.json"
    with pytest.raises(RequestError, match=r"neurons\.json.*cannot be read"):
        read_neurons(path)
    path.write_text(json.dumps({"schema": "nmke.neurons/9"}))
    with pytest.raises(RequestError, match=r"schema 'nmke\.neurons/9'"):
        read_neurons(path)
    path.write_text(json.dumps(record()))
    assert read_neurons(path) == record()
    broken = record()
    del broken["metrics"]["lps"]["over_all_layers"]
    with pytest.raises(RequestError, match="lacks KeyError\\('over_all_layers'\\)"):
        neuron_section(broken)
    with pytest.raises(RequestError, match="lacks StopIteration"):
        neuron_section({**record(), "metrics": {}})
