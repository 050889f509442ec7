"""What a model's neurons do: surveys over every layer, the sets that masks are made of, what neurons say and hear."""

from nmke.neurons.survey import Survey, survey

__all__ = ["Survey", "survey"]
