"""Edit facts in open-weights language models through neuron masks: lifelong, measured, reversible."""

__version__ = "0.1.0"
