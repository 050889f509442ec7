import pytest
from tests.bench.cells import cell, checkpoint

from nmke.bench.record import Checkpoint, TaskScore
from nmke.bench.table import make_table, markdown
from nmke.errors import RequestError


def test_a_row_holds_the_last_checkpoint_of_a_method() -> None:
    record = cell("nmke", points=[checkpoint([1.0]), checkpoint([1.0, 0.0], [1.0, 0.5], perplexity=27.5)])
    table = make_table([record])
    (row,) = table.rows
    assert (table.protocol, table.metrics) == (
        "teacher_forced/1",
        ("reliability", "generalization", "locality"),
    )
    assert (row.label, row.n_edits, row.perplexity, row.perplexity_base) == ("nmke", 2, 27.5, 25.5)
    assert row.scores["reliability"] is not None and row.scores["reliability"].mean == 0.5
    assert row.scores["locality"] is not None and row.scores["locality"].mean == 0.75
    assert row.scores["generalization"] is None
    assert row.drift == pytest.approx(0.15)
    assert make_table([record], at=1).rows[0].n_edits == 1


def test_seeds_of_one_method_share_a_row_with_the_means_over_facts() -> None:
    cells = [
        cell("nmke", points=[checkpoint([1.0, 0.0], perplexity=26.0)], seed=0, ids=["a", "b"]),
        cell("nmke", points=[checkpoint([1.0, 1.0], perplexity=28.0)], seed=1, ids=["b", "c"]),
    ]
    (row,) = make_table(cells).rows
    assert (row.seeds, row.perplexity) == ((0, 1), 27.0)
    reliability = row.scores["reliability"]
    assert reliability is not None
    assert (reliability.n, reliability.mean) == (3, pytest.approx((1 + 0.5 + 1) / 3))


def test_methods_are_set_beside_one_another_on_the_same_seeds_only() -> None:
    cells = [
        cell("nmke", points=[checkpoint([1.0, 0.0])], seed=0, ids=["a", "b"]),
        cell("nmke", points=[checkpoint([1.0, 1.0])], seed=1, ids=["c", "d"]),
        cell("rome", points=[checkpoint([1.0, 1.0])], seed=0, ids=["a", "b"]),
    ]
    table = make_table(cells)
    found = [
        (
            heading.split(", ")[-1],
            [(row.label, (one := row.scores["reliability"]) and one.mean) for row in rows],
        )
        for heading, rows in table.blocks()
    ]
    assert found == [("seed 0", [("nmke", 0.5), ("rome", 1.0)]), ("1", [("nmke", 0.75)])]
    assert [heading for heading, _ in table.blocks()][1].endswith("batches of 10, seeds 0, 1")


def test_data_sets_batch_sizes_and_settings_are_rows_of_their_own() -> None:
    cells = [
        cell("nmke", points=[checkpoint([1.0])], batch_size=size, dataset=name)
        for size in (10, 1)
        for name in ("zsre", "counterfact")
    ]
    table = make_table(cells)
    assert [(row.dataset, row.batch_size) for row in table.rows] == [
        ("counterfact", 1),
        ("counterfact", 10),
        ("zsre", 1),
        ("zsre", 10),
    ]
    assert [heading for heading, _ in table.blocks()][:2] == [
        "counterfact, tiny, 1 edits, one at a time, seed 0",
        "counterfact, tiny, 1 edits, batches of 10, seed 0",
    ]


def test_the_highest_mean_of_the_metrics_comes_first() -> None:
    def points(reliability: float, generalization: list[float | None]) -> list[Checkpoint]:
        return [checkpoint([reliability] * 2, [0.5, 1.0], generalization=generalization)]

    cells = [
        cell("memit", points=points(0.5, [0.5, 0.5])),
        cell("nmke", points=points(1.0, [1.0, 0.0])),
        cell("rome", points=points(1.0, [None, 0.0])),  # the mean of facts with all three
    ]
    table = make_table(cells)
    assert table.metrics == ("reliability", "generalization", "locality", "mean")
    found = [(row.label, row.scores["mean"]) for row in table.rows]
    assert [(label, one and (one.n, one.mean)) for label, one in found] == [
        ("nmke", (2, pytest.approx(0.75))),
        ("rome", (1, pytest.approx(2 / 3))),
        ("memit", (2, pytest.approx(1.75 / 3))),
    ]
    assert "| method | Rel | Gen | Loc | mean | perplexity |" in markdown(table)


def test_what_is_missing_is_said_with_its_reason() -> None:
    cells = [
        cell("nmke", points=[checkpoint([1.0])]),
        cell("memit", status="failed", reason="the update is not finite"),
        cell("rome", status="running"),
    ]
    table = make_table(cells)
    assert [row.label for row in table.rows] == ["nmke"]
    assert table.missing == (
        "memit (counterfact, batch 10): failed, the update is not finite",
        "rome (counterfact, batch 10): running, no checkpoint yet",
    )
    with pytest.raises(RequestError, match="no checkpoint at 7 edits; run more"):
        make_table(cells[:1], at=7)
    with pytest.raises(RequestError, match="no likelihood scores"):
        make_table(cells[:1], protocol="likelihood")


def test_markdown_names_protocol_time_seed_and_shows_what_is_not_finite() -> None:
    cells = [
        cell("nmke[mask=random]", points=[checkpoint([1.0, 0.5])]),
        cell(
            "rome", points=[checkpoint([0.0, 0.0], perplexity=float("inf"))], status="collapsed", reason="KL"
        ),
    ]
    text = markdown(make_table(cells))
    assert (
        "**counterfact, tiny, 2 edits, batches of 10, seed 0**; teacher_forced/1, after the last edit" in text
    )
    assert "| method | Rel | Gen | Loc | perplexity | KL | drift | neurons | s/edit |" in text
    assert (
        "| `nmke[mask=random]` | 0.750 [0.50, 1.00] | - | 1.000 [1.00, 1.00] | 26.00 | 0.100 | 0.150 | 50% |"
        in text
    )
    assert "| `rome` | 0.000 [0.00, 0.00] | - | 1.000 [1.00, 1.00] | not finite |" in text
    assert text.rstrip().endswith("| collapsed |")


def test_general_ability_stands_beside_its_change() -> None:
    task = {"metric": "acc", "value": 0.31, "low": 0.3, "high": 0.32, "n": 100, "base": 0.35}
    point = checkpoint([1.0]).model_copy(update={"tasks": {"mmlu": TaskScore.model_validate(task)}})
    text = markdown(make_table([cell("memit", points=[checkpoint([1.0])]), cell("nmke", points=[point])]))
    assert "| 1.000 [1.00, 1.00] | - | 26.00 |" in text
    assert "| Loc | mmlu | perplexity |" in text
    assert "| 0.310 (-0.040) |" in text
