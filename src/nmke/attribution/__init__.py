"""Scores that say how much each neuron carries a fact."""

from nmke.attribution import ablation as ablation
from nmke.attribution import activation as activation
from nmke.attribution import contribution as contribution
from nmke.attribution import gradient as gradient
from nmke.attribution import log_prob as log_prob
from nmke.attribution.base import NeuronScore, Readout, neuron_scores, read_out

__all__ = ["NeuronScore", "Readout", "neuron_scores", "read_out"]
