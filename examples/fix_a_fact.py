"""Fix one fact and prove it: what the model says before and after, what stayed, and the way back to the last bit.

python examples/fix_a_fact.py [MODEL]
"""

import sys
import tempfile
from pathlib import Path

from nmke import EditableModel, EditConfig, EditSession

ASKED = "The capital of France is"
PROMPTS = {
    "the fact itself": ASKED,
    "in other words": "The French government meets in the city of",
    "a neighbour": "The capital of Italy is",
}


def answers(session: EditSession) -> dict[str, str]:
    """What the model goes on to say, greedily."""
    texts = session.model.generate(list(PROMPTS.values()), 6, stop_at_newline=True)
    return dict(zip(PROMPTS, texts, strict=True))


def main(model: str | EditableModel, folder: Path, config: EditConfig | None = None) -> None:
    with EditSession.open(model, folder / "run", config=config) as session:
        unedited = session.content_hash
        before = answers(session)
        record = session.edit("The capital of {France} is", "Lyon")
        after = answers(session)

        print(f"\n{'':16} {'before':30} after")
        for name in PROMPTS:
            print(f"{name:16} {before[name].strip():30.30} {after[name].strip()}")
        was, now = record.detail["probability_before"], record.detail["probability_after"]
        print(f"\np(Lyon) {was:.4f} -> {now:.4f}; status: {record.status}")

        for tensor in session.changed():
            print(f"changed  {tensor.name}: {tensor.columns} of {tensor.of} columns")
        proof = session.verify()  # recomputes every hash, also that of the model as loaded back from the run
        print(f"verified {proof['events']} event; the model is {session.content_hash[:12]}")
        session.undo()
        print(
            f"undone   the model is the unedited one again, bit for bit: {session.content_hash == unedited}"
        )


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        main(sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m", Path(temporary))
