"""A stream of edits as production has it: batch after batch, the model's health after each, one edit taken back.

python examples/lifelong_stream.py [MODEL]
"""

import sys
import tempfile
from pathlib import Path

from nmke import EditableModel, EditConfig, EditSession
from nmke.evaluation.protocols import score
from nmke.facts import bundled_facts

STREAM = bundled_facts()[:24:2]


def main(model: str | EditableModel, folder: Path, config: EditConfig | None = None) -> None:
    # A batch that ruins the model is taken back by itself.
    config = config or EditConfig.create(batch_size=4, on_collapse="rollback")
    with EditSession.open(model, folder / "run", config=config) as session:
        print(f"\n{'batch':6} {'took':>5} {'KL':>7} {'perplexity':>11} {'still held':>11}  health")
        for number, report in enumerate(session.edit_many(STREAM), start=1):
            took = sum(record.status != "failed" for record in report.records)
            line = f"{number:<6} {took}/{len(report.records):<3}"
            if health := report.health:
                held = "-" if health.retention is None else f"{health.retention:.0%}"
                line += f" {health.kl:7.4f} {health.perplexity:11.2f} {held:>11}  {health.status}"
            print(line)

        mistaken = STREAM[1].id
        cost = session.revert_cost(mistaken)
        session.revert(mistaken)  # back to before its batch, then everything else again
        print(f"\nreverted {mistaken}: {cost['edits']:.0f} other edits were written again")
        before = session.content_hash
        session.undo()  # the last batch, to the bit
        print(f"undid the last batch: {before[:8]} -> {session.content_hash[:8]}")

        kept = session.active_requests()
        result = score(session.model, kept).protocols["teacher_forced"]
        for name in ("reliability", "generalization"):
            if found := result.metrics[name]:
                print(f"{name:14} {found.mean:.2f} [{found.low:.2f}, {found.high:.2f}], n = {found.n}")
        session.verify()
        print(f"{len(session.log())} events in the ledger, all hashes fit")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        main(sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m", Path(temporary))
