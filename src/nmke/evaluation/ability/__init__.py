"""General ability: what the model can still do apart from the edits, by lm-evaluation-harness on local data."""

from nmke.evaluation.ability.measure import AbilityScores, measure
from nmke.evaluation.ability.tasks import AbilityTask, ability_tasks

__all__ = ["AbilityScores", "AbilityTask", "ability_tasks", "measure"]
