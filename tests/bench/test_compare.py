import pytest
from tests.bench.cells import cell, checkpoint

from nmke.bench.compare import compare
from nmke.bench.record import CellRecord
from nmke.errors import ConfigError, RequestError
from nmke.evaluation.metrics import mean_interval


def two(a: list[float | None], b: list[float | None], **changes: object) -> list[CellRecord]:
    return [
        cell("nmke", points=[checkpoint(a)], **changes),  # type: ignore[arg-type]
        cell("memit", points=[checkpoint(b)], **changes),  # type: ignore[arg-type]
    ]


def test_the_difference_is_that_of_the_pairs_with_its_own_interval() -> None:
    a, b = [1.0, 1.0, 0.5, 1.0, 0.0] * 4, [1.0, 0.0, 0.5, 0.5, 0.25] * 4
    (found,) = compare(two(a, b), "nmke", "memit")
    reliability = found.differences[0]
    assert (reliability.protocol, reliability.metric) == ("teacher_forced", "reliability")
    literal = mean_interval([x - y for x, y in zip(a, b, strict=True)])
    assert reliability.difference == literal
    assert (reliability.better, reliability.equal, reliability.worse) == (8, 8, 4)
    assert (reliability.a.mean, reliability.b.mean) == (pytest.approx(0.7), pytest.approx(0.45))
    assert found.n_edits == 20


@pytest.mark.parametrize(
    ("a", "b", "verdict"),
    [
        ([1.0] * 10, [0.0] * 10, "A higher"),
        ([0.0] * 10, [1.0] * 10, "B higher"),
        ([1.0, 0.0] * 5, [0.0, 1.0] * 5, "no difference shown"),
    ],
)
def test_a_verdict_is_given_only_when_the_interval_leaves_zero_out(
    a: list[float | None], b: list[float | None], verdict: str
) -> None:
    assert compare(two(a, b), "nmke", "memit")[0].differences[0].verdict == verdict


def test_pairing_narrows_the_interval_where_facts_differ_more_than_methods() -> None:
    b = [0.1 * i for i in range(10)]
    (found,) = compare(two([x + 0.05 for x in b], b), "nmke", "memit")
    difference = found.differences[0]
    assert difference.difference.high - difference.difference.low < 1e-6
    assert difference.a.high - difference.a.low > 0.2


def test_facts_without_a_value_on_either_side_are_left_out() -> None:
    (found,) = compare(two([1.0, None, 1.0], [0.0, 1.0, 1.0]), "nmke", "memit")
    assert (found.differences[0].difference.n, found.differences[0].difference.mean) == (2, 0.5)
    assert [d.metric for d in found.differences] == ["reliability", "locality"]  # no generalization at all


def test_the_mean_of_a_protocols_metrics_is_taken_fact_by_fact() -> None:
    a = checkpoint([1.0, 1.0, 0.0], [0.5, 1.0, 0.0], generalization=[0.0, 1.0, None])
    b = checkpoint([1.0, 0.0, 1.0], [1.0, 1.0, 1.0], generalization=[1.0, 1.0, 1.0])
    (found,) = compare([cell("nmke", points=[a]), cell("memit", points=[b])], "nmke", "memit")
    *single, mean = found.differences
    assert [d.metric for d in single] == ["reliability", "generalization", "locality"]
    literal = mean_interval([1.5 / 3 - 1.0, 1.0 - 2 / 3])  # the third fact has no generalization on one side
    assert (mean.metric, mean.better, mean.worse, mean.equal) == ("mean", 1, 1, 0)
    assert mean.difference.mean == pytest.approx(literal.mean) and mean.difference.n == 2
    assert (mean.difference.low, mean.difference.high) == pytest.approx((literal.low, literal.high))


def test_seeds_are_averaged_fact_by_fact_whatever_their_order() -> None:
    def pair(seed: int, ids: list[str], a: list[float | None], b: list[float | None]) -> list[CellRecord]:
        return two(a, b, seed=seed, ids=ids, facts_hash=f"h{seed}")

    cells = pair(0, ["x", "y"], [1.0, 0.0], [0.0, 0.0]) + pair(1, ["y", "x"], [0.0, 0.0], [0.0, 0.0])
    (found,) = compare(cells, "nmke", "memit")
    assert found.a.facts(2, "after_last", "teacher_forced", "reliability") == {"x": 0.5, "y": 0.0}
    assert (found.differences[0].difference.mean, found.differences[0].difference.n) == (0.25, 2)
    assert found.a.seeds == (0, 1)


def test_only_seeds_that_both_ran_are_compared() -> None:
    cells = [
        *two([1.0, 0.0], [0.0, 0.0], seed=0, facts_hash="h0"),
        *two([1.0, 1.0], [0.0, 0.0], seed=1, facts_hash="h1"),
    ]
    (found,) = compare(cells[:3], "nmke", "memit")
    assert (found.a.seeds, found.b.seeds) == ((0,), (0,))
    assert found.differences[0].difference.mean == 0.5


def test_the_last_checkpoint_that_both_have_is_compared_unless_another_is_asked_for() -> None:
    long = cell("nmke", points=[checkpoint([1.0]), checkpoint([1.0, 1.0])], ids=["a", "b"])
    short = cell("memit", points=[checkpoint([0.0])], ids=["a", "b"], status="collapsed")
    assert compare([long, short], "nmke", "memit")[0].n_edits == 1
    with pytest.raises(ConfigError, match="checkpoint 2 asked, they share 1"):
        compare([long, short], "nmke", "memit", at=2)


def test_a_method_with_one_batch_size_is_compared_with_every_size_of_the_other() -> None:
    cells = [
        cell("rome", points=[checkpoint([1.0])], batch_size=1),
        cell("nmke", points=[checkpoint([1.0])], batch_size=10),
        cell("nmke", points=[checkpoint([0.0])], batch_size=100),
    ]
    found = compare(cells, "nmke", "rome")
    assert [(one.a.batch_size, one.b.batch_size) for one in found] == [(10, 1), (100, 1)]
    assert found[1].to_json()["batch_sizes"] == [100, 1]


def test_methods_on_different_facts_are_not_compared() -> None:
    cells = [
        cell("nmke", points=[checkpoint([1.0])], facts_hash="one"),
        cell("memit", points=[checkpoint([1.0])], facts_hash="two"),
    ]
    with pytest.raises(RequestError, match="did not edit the same facts with the same seed"):
        compare(cells, "nmke", "memit")


def test_an_unknown_label_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'memit'"):
        compare(two([1.0], [1.0]), "nmke", "memitt")
