"""A benchmark of the default model itself, on the facts that ship with the package."""

from importlib.resources import as_file, files
from pathlib import Path

import pytest

from nmke.bench.compare import compare
from nmke.bench.plan import Plan
from nmke.bench.runner import Bench
from nmke.bench.table import make_table, markdown

pytestmark = pytest.mark.model


def test_nmke_against_the_unedited_model(tmp_path: Path) -> None:
    with as_file(files("nmke") / "data" / "facts.jsonl") as facts:
        plan = Plan.create(
            model="smollm2-135m",
            methods=("unedited", "nmke"),
            data=(str(facts),),
            edits=4,
            batch_sizes=(4,),
            held_out_tokens=512,
        )
        unedited, nmke = Bench(tmp_path, plan).run()
    assert (unedited.status, nmke.status) == ("done", "done")
    before, after = unedited.checkpoints[0], nmke.checkpoints[0]
    assert (before.held_out.kl, before.n_edits, after.n_edits) == (0.0, 4, 4)
    assert before.held_out.perplexity == after.held_out.perplexity_base
    assert after.held_out.perplexity is not None
    assert after.held_out.perplexity < 1.1 * after.held_out.perplexity_base
    assert after.neurons_kept is not None and after.neurons_kept < 0.2
    found = {d.metric: d for d in compare([unedited, nmke], "nmke", "unedited")[0].differences}
    assert found["reliability"].a.mean > 0.9
    assert found["reliability"].verdict == "A higher"
    assert found["locality"].b.mean == 1.0
    assert "| `nmke` |" in markdown(make_table([unedited, nmke]))
