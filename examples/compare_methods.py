"""Compare two methods fairly: the same facts in the same batches, scored after the last edit, fact by fact.

python examples/compare_methods.py [MODEL]
"""

import sys
import tempfile
from pathlib import Path

from nmke import EditableModel, EditConfig, EditSession
from nmke.evaluation.base_outputs import collect_base
from nmke.evaluation.metrics import paired_difference
from nmke.evaluation.protocols import score
from nmke.evaluation.score_table import ScoreTable
from nmke.facts import bundled_facts

FACTS = bundled_facts()[::14]
METRICS = ("reliability", "generalization", "locality")


def run(session: EditSession, method: str, **settings: object) -> ScoreTable:
    """Edit all facts with a method, score them, take everything back: the next one begins where this one did."""
    base = collect_base(session.model, FACTS)
    with session.using(method=method, **settings):
        batches = sum(1 for _ in session.edit_many(FACTS))
    table = score(session.model, FACTS, base)
    session.undo(batches)
    return table


def main(model: str | EditableModel, folder: Path, config: EditConfig | None = None) -> None:
    config = config or EditConfig.create(batch_size=7)
    with EditSession.open(model, folder / "run", config=config) as session:
        tables = {"nmke": run(session, "nmke"), "all neurons": run(session, "nmke", mask="none")}
    print(f"\nteacher_forced/1, after the last edit, n = {len(FACTS)}, 95 % intervals")
    for name, table in tables.items():
        found = table.protocols["teacher_forced"].metrics
        cells = [f"{m} {found[m].mean:.2f} [{found[m].low:.2f}, {found[m].high:.2f}]" for m in METRICS]
        print(f"{name:12} {'  '.join(cells)}")
    a, b = tables.values()
    for metric in METRICS:
        means = [[row.mean("teacher_forced", metric) or 0.0 for row in table.rows] for table in (a, b)]
        d = paired_difference(means[0], means[1])
        verdict = "no difference shown" if d.low <= 0 <= d.high else "a difference"
        print(f"{metric:14} nmke - all neurons: {d.mean:+.2f} [{d.low:+.2f}, {d.high:+.2f}]: {verdict}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        main(sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m", Path(temporary))
