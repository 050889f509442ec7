"""The benchmarks of the field by name: which file each one reads, and what its cases ask.

A benchmark is a file in one of the shapes of `nmke.facts`. The files are third-party data and never part of the
package: they are looked up with `nmke.facts.data_path`, and `nmke data get NAME` fetches what can be had from
its canonical address.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nmke.evaluation.data_sets import missing
from nmke.facts import FactsFile, data_path, read_facts
from nmke.registry import Registry


@dataclass(frozen=True)
class Benchmark:
    """One set of edit cases.

    Args:
        shape: Name of its records' shape.
        files: Names that its file may have, the first that is found is read.
        asks: What is asked beside the edit itself, in words.
    """

    shape: str
    files: tuple[str, ...]
    asks: str

    def find(self) -> Path | None:
        """The file to read, None when none of the names is on this machine."""
        return next((path for name in self.files if (path := data_path(name)) is not None), None)


benchmarks: Registry[Benchmark] = Registry("benchmark")


def read_benchmark(
    name: str, *, limit: int | None = None, offset: int = 0, derived: bool = False, distinct: bool = False
) -> FactsFile:
    """The cases of a benchmark.

    Args:
        name: A name out of `benchmarks`.
        limit: Read at most this many records.
        offset: Leave out this many records at the start.
        derived: Use derived paraphrases and neighbours where the file has some; off, because they are not the
            benchmark's own.
        distinct: Leave out cases that ask for a subject and relation asked for before, as long streams need it.

    Raises:
        ConfigError: If there is no such benchmark.
        RequestError: If its file is not on this machine, or is malformed.
    """
    benchmark = benchmarks.get(name)
    path = benchmark.find()
    if path is None:
        raise missing("benchmark", name, benchmark.files)
    shape = benchmark.shape
    return read_facts(path, limit=limit, offset=offset, shape=shape, derived=derived, distinct=distinct)


def _add(name: str, shape: str, files: tuple[str, ...], *, source: str, summary: str, asks: str) -> None:
    benchmarks.register(name, Benchmark(shape, files, asks), source=source, summary=summary)


_add(
    "counterfact",
    "counterfact",
    ("counterfact.jsonl.gz", "counterfact.json", "multi_counterfact.json"),
    source="arXiv:2202.05262",
    summary="false facts about real things",
    asks="paraphrases, neighbours with the same true answer",
)
_add(
    "counterfact-full",
    "counterfact",
    ("counterfact_full500.jsonl", "counterfact.json", "multi_counterfact.json"),
    source="arXiv:2202.05262",
    summary="the records of CounterFact with two true paraphrases and ten neighbours",
    asks="paraphrases, neighbours, generations",
)
_add(
    "zsre",
    "zsre",
    ("zsre.jsonl", "zsre_mend_eval.json"),
    source="arXiv:1706.04115, arXiv:2110.11309",
    summary="questions whose answer is changed",
    asks="one paraphrase, one unrelated question",
)
_add(
    "zsre-knowedit",
    "knowedit",
    ("zsre_knowedit.jsonl", "ZsRE-test-all.json"),
    source="arXiv:2401.01286",
    summary="ZsRE as cleaned for KnowEdit",
    asks="paraphrase, other relations of the subject, aliases, reasoning, logical generalization",
)
_add(
    "wikibigedit",
    "easyedit",
    ("wikibigedit_3k.jsonl", "wikibigedit_3k.json"),
    source="arXiv:2503.05683",
    summary="real changes of Wikidata, the sample of 3,000 used by LocFT",
    asks="paraphrase, a like question about another subject",
)
_add(
    "wikibigedit-full",
    "wikibigedit",
    ("wiki_big_edit_20240201_20240220.json",),
    source="arXiv:2503.05683",
    summary="real changes of Wikidata, first of the published periods",
    asks="paraphrase, persona, multi-hop, a like question about another subject",
)
_add(
    "mquake-hard",
    "mquake",
    ("mquake_hard.jsonl.gz", "MQuAKE-hard.json"),
    source="arXiv:2401.10471, arXiv:2305.14795",
    summary="four facts edited together",
    asks="three wordings of a four-hop question",
)
_add(
    "mquake-cf-3k",
    "mquake",
    ("MQuAKE-CF-3k.json",),
    source="arXiv:2305.14795",
    summary="one to four false facts edited together",
    asks="three wordings of a question of two to four hops",
)
_add(
    "peak-counter",
    "peak",
    ("peak_counter.jsonl.gz", "PEAK_counter.json"),
    source="arXiv:2401.17623",
    summary="a false answer added to several true ones",
    asks="paraphrases, neighbours, whether each true answer stays likelier than a false one",
)
_add(
    "peak-time",
    "peak",
    ("peak_time.jsonl.gz", "PEAK_time.json"),
    source="arXiv:2401.17623",
    summary="a new true answer added to several older ones",
    asks="paraphrases, neighbours, whether each older answer stays likelier than a false one",
)
_add(
    "pitfalls-reverse",
    "conflict",
    ("pitfalls_reverse_edit.jsonl.gz", "reverse_edit.json"),
    source="arXiv:2310.02129",
    summary="a fact, then one that contradicts its reversal",
    asks="the conflict, the reversal of the second fact",
)
_add(
    "pitfalls-composite",
    "conflict",
    ("pitfalls_composite_edit.jsonl.gz", "composite_edit.json"),
    source="arXiv:2310.02129",
    summary="a fact, then one that contradicts what follows from it and a third",
    asks="the conflict, the third fact",
)
_add(
    "pitfalls-easy",
    "round",
    ("pitfalls_easy.jsonl.gz", "easy.json"),
    source="arXiv:2310.02129",
    summary="a fact with several answers edited away and back; the other object is near",
    asks="whether the other true answers are still likelier than the object edited in and out",
)
_add(
    "pitfalls-hard",
    "round",
    ("pitfalls_hard.jsonl.gz", "hard.json"),
    source="arXiv:2310.02129",
    summary="a fact with several answers edited away and back; the other object is far",
    asks="whether the other true answers are still likelier than the object edited in and out",
)
_add(
    "wise-temporal",
    "easyedit",
    ("wise_temporal_edit.jsonl", "temporal-edit.json"),
    source="arXiv:2405.14768",
    summary="descriptions of things that came up after training",
    asks="another description with the same opening, an unrelated text",
)
_add(
    "wise-hallucination",
    "easyedit",
    ("wise_hallucination_edit.jsonl", "hallucination-edit.json"),
    source="arXiv:2405.14768",
    summary="sentences of a biography put right",
    asks="an unrelated text",
)
_add(
    "known",
    "known",
    ("known_1000.jsonl", "known_1000.json"),
    source="arXiv:2202.05262",
    summary="true facts that GPT-2 XL knows; to measure what is kept, not to edit",
    asks="nothing else",
)
