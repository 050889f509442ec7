"""Scores that say how much each neuron carries a fact."""
