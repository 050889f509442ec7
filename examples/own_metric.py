"""Write your own importance metric: which neurons may an edit write into? It must beat neurons drawn by lot.

python examples/own_metric.py [MODEL]
"""

import sys
import tempfile
from pathlib import Path

from nmke import EditableModel, EditConfig, EditSession
from nmke.evaluation.base_outputs import collect_base
from nmke.evaluation.protocols import score
from nmke.facts import bundled_facts
from nmke.masking.per_edit import KeyScores, MeanSquares, key_scores
from nmke.types import Keys

FACTS = bundled_facts()[:6]


def surprise(keys: Keys, directions: KeyScores, mean_squares: MeanSquares) -> KeyScores:
    """How far a neuron is above its usual size at the subject, times how much the solve would use it."""
    usual = mean_squares.to(keys).clamp(min=1e-30).sqrt()
    return (keys.abs() / usual) * directions.abs()


if "surprise" not in key_scores:
    key_scores.register("surprise", surprise, source="this file", summary="surprise times use")


def main(model: str | EditableModel, folder: Path, config: EditConfig | None = None) -> None:
    base_config = config or EditConfig.create(batch_size=len(FACTS), mask="fixed", ratio=0.08)
    with EditSession.open(model, folder / "run", config=base_config) as session:
        base = collect_base(session.model, FACTS)  # for locality: what the unedited model says
        print(f"\n{'neurons by':12} {'reliability':>12} {'generalization':>15} {'locality':>9}")
        choices = {"surprise": "fixed", "write": "fixed", "by lot": "random"}
        for name, mask in choices.items():
            with session.using(attribution="write" if mask == "random" else name, mask=mask):
                session.edit_batch(FACTS)
            found = score(session.model, FACTS, base).protocols["teacher_forced"].metrics
            means = [found[metric].mean for metric in ("reliability", "generalization", "locality")]
            print(f"{name:12} {means[0]:12.2f} {means[1]:15.2f} {means[2]:9.2f}")
            session.undo()
        print(f"n = {len(FACTS)} facts: enough to see a metric that fails, not to rank two that work")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        main(sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m", Path(temporary))
