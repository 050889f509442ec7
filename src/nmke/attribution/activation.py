"""MPC: the neuron's coefficient alone, the cheapest score. Source: NMKE, arXiv:2510.22139, sec. 4.4."""

from __future__ import annotations

from nmke.attribution.base import Readout, neuron_scores
from nmke.types import Scores


def coefficient(readout: Readout, layer: int, amplification: float) -> Scores:
    """The down-projection's input c at the scored token, [prompts, d_mlp]; amplification does not enter."""
    return readout.coefficients[layer]


neuron_scores.register("mpc", coefficient, source="arXiv:2510.22139", summary="the neuron's coefficient")
