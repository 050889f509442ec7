"""Where each data set comes from: its canonical address, the file it becomes, and what is known of its bytes.

Nothing of these data sets is part of the package. A sha256 is given where it is known beforehand; otherwise the one
of the first download is recorded beside the files and checked from then on.
"""

from __future__ import annotations

from dataclasses import dataclass

from nmke.errors import RequestError
from nmke.registry import Registry

ROME = "https://rome.baulab.info/data/dsets"
GITHUB = "https://raw.githubusercontent.com"
HUB = "https://huggingface.co/datasets"


@dataclass(frozen=True)
class DataFile:
    """One file to fetch.

    Args:
        url: Where it is published.
        name: What it is called in the data folder.
        sha256: Of the bytes behind `url`, None when not known beforehand.
        member: Path inside the archive behind `url` (zip); None when `url` is the file itself.
        labels: Address of a text file with one label a line, which become the records' `label`; None without.
    """

    url: str
    name: str
    sha256: str | None = None
    member: str | None = None
    labels: str | None = None


@dataclass(frozen=True)
class DataSet:
    """What `nmke data get NAME` fetches.

    Args:
        files: In order.
        licence: As its publisher states it.
    """

    files: tuple[DataFile, ...]
    licence: str


data_sets: Registry[DataSet] = Registry("data set")
SAME_FILE = {"counterfact-full": "counterfact"}


def source_of(name: str) -> str | None:
    """The data set that a benchmark or task of this name can be read from, None when none can be fetched."""
    found = SAME_FILE.get(name, name)
    return found if found in data_sets else None


def missing(kind: str, name: str, files: tuple[str, ...]) -> RequestError:
    """The error for a file that is not on this machine, with the way to get it."""
    fetch = f"fetch it with `nmke data get {name}`, or " if source_of(name) else ""
    return RequestError(
        f"{kind} {name!r} needs {' or '.join(files)}, which is not on this machine; "
        f"{fetch}put it into a folder and name that in NMKE_DATA"
    )


def _add(name: str, *files: DataFile, licence: str, source: str, summary: str) -> None:
    data_sets.register(name, DataSet(files, licence), source=source, summary=summary)


_add(
    "counterfact",
    DataFile(f"{ROME}/counterfact.json", "counterfact.json"),
    licence="MIT",
    source="arXiv:2202.05262",
    summary="CounterFact with all paraphrases, neighbours and generation prompts",
)
_add(
    "multi-counterfact",
    DataFile("https://memit.baulab.info/data/dsets/multi_counterfact.json", "multi_counterfact.json"),
    licence="MIT",
    source="arXiv:2210.07229",
    summary="CounterFact without records that contradict each other",
)
_add(
    "zsre",
    DataFile("https://memit.baulab.info/data/dsets/zsre_mend_eval.json", "zsre_mend_eval.json"),
    licence="not stated",
    source="arXiv:1706.04115, arXiv:2110.11309",
    summary="ZsRE as ROME and MEMIT evaluate it",
)
_add(
    "known",
    DataFile(f"{ROME}/known_1000.json", "known_1000.json"),
    licence="MIT",
    source="arXiv:2202.05262",
    summary="true facts that GPT-2 XL knows",
)
_add(
    "zsre-knowedit",
    DataFile(f"{HUB}/zjunlp/KnowEdit/resolve/main/benchmark/ZsRE/ZsRE-test-all.json", "ZsRE-test-all.json"),
    licence="MIT",
    source="arXiv:2401.01286",
    summary="KnowEdit's ZsRE with portability questions",
)
_add(
    "wikibigedit-full",
    DataFile(
        f"{HUB}/lukasthede/WikiBigEdit/resolve/main/wiki_big_edit_20240201_20240220.json",
        "wiki_big_edit_20240201_20240220.json",
    ),
    licence="Apache-2.0 (repository)",
    source="arXiv:2503.05683",
    summary="WikiBigEdit, first period",
)
_add(
    "wikibigedit",
    DataFile(f"{GITHUB}/ICT-STAR/LocFT/main/data/wikibigedit/wikibigedit_3k.json", "wikibigedit_3k.json"),
    licence="MIT (repository)",
    source="arXiv:2503.05683",
    summary="the 3,000 WikiBigEdit records that LocFT uses",
)
_add(
    "mquake-cf-3k",
    DataFile(f"{GITHUB}/princeton-nlp/MQuAKE/main/datasets/MQuAKE-CF-3k.json", "MQuAKE-CF-3k.json"),
    licence="MIT",
    source="arXiv:2305.14795",
    summary="MQuAKE, counterfactual edits, 3,000 cases",
)
_add(
    "mquake-hard",
    DataFile(f"{GITHUB}/wangywUST/DeepEdit/main/datasets/MQuAKE-hard.json", "MQuAKE-hard.json"),
    licence="not stated",
    source="arXiv:2401.10471",
    summary="MQuAKE-hard of DeepEdit, four edits a case",
)
_add(
    "peak-counter",
    DataFile(f"{GITHUB}/mjy1111/PEAK/main/data/PEAK_counter.json", "PEAK_counter.json"),
    licence="not stated",
    source="arXiv:2401.17623",
    summary="PEAK, counterfactual",
)
_add(
    "peak-time",
    DataFile(f"{GITHUB}/mjy1111/PEAK/main/data/PEAK_time.json", "PEAK_time.json"),
    licence="not stated",
    source="arXiv:2401.17623",
    summary="PEAK, temporal",
)
for _name, _file, _about in (
    ("pitfalls-reverse", "reverse_edit.json", "ConflictEdit, reverse"),
    ("pitfalls-composite", "composite_edit.json", "ConflictEdit, composite"),
    ("pitfalls-easy", "easy.json", "RoundEdit, easy"),
    ("pitfalls-hard", "hard.json", "RoundEdit, hard"),
):
    _add(
        _name,
        DataFile(f"{GITHUB}/zjunlp/PitfallsKnowledgeEditing/main/data/GPT-J/{_file}", _file),
        licence="MIT",
        source="arXiv:2310.02129",
        summary=_about,
    )
for _name, _place in (
    ("wise-temporal", "temporal/temporal-edit.json"),
    ("wise-hallucination", "hallucination/hallucination-edit.json"),
):
    _add(
        _name,
        DataFile(f"{GITHUB}/sci-m-wang/REPAIR/main/data/wise/{_place}", _place.rpartition("/")[2]),
        licence="MIT (EasyEdit)",
        source="arXiv:2405.14768",
        summary=f"WISE, {_name.partition('-')[2]} edits",
    )
_add(
    "gsm8k",
    DataFile(
        f"{GITHUB}/openai/grade-school-math/master/grade_school_math/data/test.jsonl", "gsm8k_test.jsonl"
    ),
    DataFile(
        f"{GITHUB}/openai/grade-school-math/master/grade_school_math/data/train.jsonl", "gsm8k_train.jsonl"
    ),
    licence="MIT",
    source="arXiv:2110.14168",
    summary="GSM8K test, and train for worked examples",
)
_add(
    "commonsenseqa",
    DataFile("https://s3.amazonaws.com/commensenseqa/dev_rand_split.jsonl", "dev_rand_split.jsonl"),
    licence="MIT",
    source="arXiv:1811.00937",
    summary="CommonsenseQA dev",
)
for _name, _place in (("arc_easy", "ARC-Easy"), ("arc_challenge", "ARC-Challenge")):
    _add(
        _name,
        DataFile(
            "https://s3-us-west-2.amazonaws.com/ai2-website/data/ARC-V1-Feb2018.zip",
            f"{_place}-Test.jsonl",
            member=f"ARC-V1-Feb2018-2/{_place}/{_place}-Test.jsonl",
        ),
        licence="CC BY-SA 4.0",
        source="arXiv:1803.05457",
        summary=f"{_place} test",
    )
_add(
    "openbookqa",
    DataFile(
        "https://s3-us-west-2.amazonaws.com/ai2-website/data/OpenBookQA-V1-Sep2018.zip",
        "openbookqa_test.jsonl",
        sha256="82368cf05df2e3b309c17d162e10b888b4d768fad6e171e0a041954c8553be46",
        member="OpenBookQA-V1-Sep2018/Data/Main/test.jsonl",
    ),
    licence="Apache-2.0",
    source="arXiv:1809.02789",
    summary="OpenBookQA test",
)
_add(
    "piqa",
    DataFile(
        "https://yonatanbisk.com/piqa/data/valid.jsonl",
        "piqa_valid.jsonl",
        labels="https://yonatanbisk.com/piqa/data/valid-labels.lst",
    ),
    licence="AFL 3.0",
    source="arXiv:1911.11641",
    summary="PIQA validation with its labels",
)
_add(
    "winogrande",
    DataFile(
        "https://storage.googleapis.com/ai2-mosaic/public/winogrande/winogrande_1.1.zip",
        "winogrande_dev.jsonl",
        member="winogrande_1.1/dev.jsonl",
    ),
    licence="CC BY",
    source="arXiv:1907.10641",
    summary="WinoGrande dev",
)
_add(
    "boolq",
    DataFile("https://storage.googleapis.com/boolq/dev.jsonl", "boolq_dev.jsonl"),
    licence="CC BY-SA 3.0",
    source="arXiv:1905.10044",
    summary="BoolQ dev; passages are not shown to the model",
)
_add(
    "lambada",
    DataFile(
        "https://openaipublic.blob.core.windows.net/gpt-2/data/lambada_test.jsonl",
        "lambada_test.jsonl",
        sha256="4aa8d02cd17c719165fc8a7887fddd641f43fcafa4b1c806ca8abc31fabdb226",
    ),
    licence="CC BY 4.0",
    source="arXiv:1606.06031",
    summary="LAMBADA test in OpenAI's form",
)
_add(
    "wikitext",
    DataFile(
        f"{GITHUB}/pytorch/examples/main/word_language_model/data/wikitext-2/test.txt", "wikitext2_test.txt"
    ),
    licence="CC BY-SA",
    source="arXiv:1609.07843",
    summary="WikiText-2 test, tokenised form",
)
