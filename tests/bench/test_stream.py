import json
from pathlib import Path
from typing import Any

import pytest

from nmke.bench.plan import Plan
from nmke.bench.stream import load_stream
from nmke.errors import RequestError


@pytest.fixture
def facts(tmp_path: Path) -> Path:
    """Twelve facts: number 3 lacks a paraphrase, 4 a neighbour, and 5 asks again what 2 asks."""
    rows: list[dict[str, Any]] = []
    for i in range(12):
        subject = f"City {2 if i == 5 else i}"
        rows.append(
            {
                "id": f"f{i}",
                "prompt": "The river of {} is",
                "subject": subject,
                "target_new": "Nile",
                "paraphrases": [] if i == 3 else [f"{subject} lies on the"],
                "neighborhood": [] if i == 4 else [{"prompt": "The river of Rome is", "answer": "Tiber"}],
            }
        )
    path = tmp_path / "facts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def ids(facts: Path, seed: int = 0, **changes: Any) -> tuple[str, ...]:
    plan = Plan.create(**{"model": "tiny", "methods": ("memit",), **changes})
    stream = load_stream(plan, str(facts), seed)
    assert stream.identity.ids == tuple(request.id for request in stream.requests)
    return stream.identity.ids


def test_only_complete_facts_are_taken_and_none_twice(facts: Path) -> None:
    kept = ("f0", "f1", "f2", "f6", "f7", "f8", "f9", "f10", "f11")
    assert ids(facts, order="file") == kept
    assert set(ids(facts)) == set(kept)
    assert ids(facts, order="file", complete=False) == tuple(f"f{i}" for i in range(12) if i != 5)


def test_the_seed_draws_and_orders_and_always_the_same(facts: Path) -> None:
    assert ids(facts, 0) == ids(facts, 0)
    assert ids(facts, 0) != ids(facts, 1)
    assert ids(facts, 0, edits=4) != ids(facts, 1, edits=4)


def test_a_shorter_stream_is_the_beginning_of_a_longer_one(facts: Path) -> None:
    assert ids(facts, 3, edits=4) == ids(facts, 3, edits=8)[:4]


def test_records_bound_the_pool(facts: Path) -> None:
    assert ids(facts, records="6:9", order="file") == ("f6", "f7", "f8")
    assert ids(facts, records="10:", order="file") == ("f10", "f11")


def test_what_is_edited_is_in_the_identity(facts: Path) -> None:
    plan = Plan.create(model="tiny", methods=("memit",), records="6:9", edits=2)
    one, other = (load_stream(plan, str(facts), seed).identity for seed in (0, 1))
    assert (one.start, one.stop, one.order, one.complete) == (6, 9, "shuffled", True)
    assert one.file_sha256 == other.file_sha256
    assert one.facts_hash != other.facts_hash


def test_too_small_a_pool_and_an_unknown_data_set_are_errors(facts: Path, tmp_path: Path) -> None:
    with pytest.raises(
        RequestError, match=r"20 edits of .* asked, records 0: hold 9 complete, distinct facts"
    ):
        ids(facts, edits=20)
    with pytest.raises(RequestError, match="is neither a known name"):
        ids(tmp_path / "nothing.jsonl")
