"""Which facts a cell edits, in which order: the same for every method of a benchmark.

Only prompts of the data set itself are used unless derived ones are asked for, and only facts that have a
paraphrase and a neighbour, so that every score is over the same facts. Of two facts about the same subject and
relation the first stays: a stream must not contradict itself.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from nmke.bench.plan import Plan
from nmke.bench.record import StreamIdentity
from nmke.errors import RequestError
from nmke.evaluation.base_outputs import facts_hash
from nmke.evaluation.benchmarks import benchmarks, read_benchmark
from nmke.facts import read_facts
from nmke.types import EditRequest


@dataclass(frozen=True)
class Stream:
    """Facts in the order of editing, and what identifies them."""

    requests: tuple[EditRequest, ...]
    identity: StreamIdentity


def load_stream(plan: Plan, dataset: str, seed: int) -> Stream:
    """The facts of one data set for one seed.

    Args:
        plan: Pool, number, order and filters.
        dataset: A benchmark's name, or the path of a facts file.
        seed: Of the draw, when the order is "shuffled".

    Raises:
        RequestError: If the data set is not on this machine, or the pool holds too few facts.
    """
    start, stop = plan.pool
    limit = None if stop is None else stop - start
    if dataset in benchmarks:
        read = read_benchmark(dataset, offset=start, limit=limit, derived=plan.derived)
    elif Path(dataset).is_file():
        read = read_facts(dataset, offset=start, limit=limit, derived=plan.derived)
    else:
        known = ", ".join(benchmarks.names())
        raise RequestError(
            f"data set {dataset!r} is neither a known name ({known}) nor a facts file; name one"
        )
    pool = distinct(r for r in read.requests if not plan.complete or (r.paraphrases and r.neighborhood))
    wanted = plan.edits or len(pool)
    if not pool or wanted > len(pool):
        kind = "complete, distinct facts" if plan.complete else "distinct facts"
        raise RequestError(
            f"{wanted or 'some'} edits of {dataset!r} asked, records {plan.records} hold {len(pool)} {kind}; "
            "ask for fewer, widen --records, or take incomplete facts too with --incomplete"
        )
    chosen = draw(pool, wanted, seed) if plan.order == "shuffled" else pool[:wanted]
    identity = StreamIdentity(
        dataset=dataset if dataset in benchmarks else Path(dataset).name,
        file_sha256=read.sha256,
        start=start,
        stop=stop,
        order=plan.order,
        complete=plan.complete,
        derived=plan.derived,
        facts_hash=facts_hash(chosen),
        ids=tuple(request.id for request in chosen),
    )
    return Stream(tuple(chosen), identity)


def distinct(requests: Iterable[EditRequest]) -> list[EditRequest]:
    """The requests without those that ask about a subject and relation asked about before."""
    seen: dict[tuple[str, str], EditRequest] = {}
    for request in requests:
        seen.setdefault((request.subject.casefold(), request.relation or request.prompt), request)
    return list(seen.values())


def draw(pool: Sequence[EditRequest], count: int, seed: int) -> list[EditRequest]:
    """`count` facts of the pool in random order; fewer are the beginning of more, so that streams can grow."""
    order = list(pool)
    random.Random(seed).shuffle(order)
    return order[:count]
