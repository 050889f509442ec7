"""The tasks of general ability: their data, their prompt files, what chance would score.

The prompt of each task is a file of ours in `tasks/`, in the harness's own format and without data. Data files are
looked up like benchmarks (`nmke.facts.data_path`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from nmke.evaluation.ability import rows
from nmke.evaluation.data_sets import missing
from nmke.facts import data_path
from nmke.registry import Registry


@dataclass(frozen=True)
class AbilityTask:
    """One task.

    Args:
        title: What it is, with the subset where it is one.
        files: Names that its data file may have, the first that is found is read.
        row: Record to row.
        chance: What guessing scores on its first metric, None where guessing hits nothing.
        shots: Names of the file that worked examples are taken from, and how many; none when 0.
    """

    title: str
    files: tuple[str, ...]
    row: Callable[[Mapping[str, Any]], rows.Row]
    chance: float | None
    shot_files: tuple[str, ...] = ()
    shots: int = 0

    def find(self) -> Path | None:
        """The data file, None when it is not on this machine."""
        return _first(self.files)

    def find_shots(self) -> Path | None:
        """The file of worked examples, None when there is none on this machine."""
        return _first(self.shot_files)


ability_tasks: Registry[AbilityTask] = Registry("task")


def prompt_file(name: str) -> dict[str, Any]:
    """The task's file for the harness, as read."""
    text = (resources.files("nmke.evaluation.ability") / "tasks" / f"{name}.yaml").read_text(encoding="utf-8")
    return dict(yaml.safe_load(text))


def required_file(name: str, path: Path | None, files: tuple[str, ...]) -> Path:
    """The file that was found.

    Raises:
        RequestError: If none was; says how to get it.
    """
    if path is None:
        raise missing("task", name, files)
    return path


def _first(files: tuple[str, ...]) -> Path | None:
    return next((path for name in files if (path := data_path(name)) is not None), None)


def _add(name: str, task: AbilityTask, *, source: str, summary: str) -> None:
    ability_tasks.register(name, task, source=source, summary=summary)


_add(
    "mmlu",
    AbilityTask("MMLU, 1,516-question subset", ("bench_mmlu.jsonl",), rows.choice, 0.25),
    source="arXiv:2009.03300",
    summary="school and university questions, answered by letter",
)
_add(
    "gsm8k",
    AbilityTask(
        "GSM8K test, 5 worked examples",
        ("bench_gsm8k_test.jsonl", "gsm8k_test.jsonl"),
        rows.gsm8k,
        None,
        ("bench_gsm8k_train200.jsonl", "gsm8k_train.jsonl"),
        5,
    ),
    source="arXiv:2110.14168",
    summary="word problems, the last number of the generated solution",
)
_add(
    "commonsenseqa",
    AbilityTask(
        "CommonsenseQA dev", ("bench_commonsenseqa_dev.jsonl", "dev_rand_split.jsonl"), rows.choice, 0.2
    ),
    source="arXiv:1811.00937",
    summary="everyday questions with five choices, answered by letter",
)
_add(
    "bbh",
    AbilityTask("BIG-Bench Hard, zero-shot, 27 tasks", ("bench_bbh.jsonl.gz", "bbh.jsonl"), rows.bbh, None),
    source="arXiv:2210.09261",
    summary="hard reasoning tasks, the generated answer must be exact",
)
_add(
    "arc_easy",
    AbilityTask("ARC-Easy test", ("bench_arc_easy_test.jsonl", "ARC-Easy-Test.jsonl"), rows.choice, 0.25),
    source="arXiv:1803.05457",
    summary="school science, the likeliest answer text",
)
_add(
    "arc_challenge",
    AbilityTask(
        "ARC-Challenge test",
        ("bench_arc_challenge_test.jsonl", "ARC-Challenge-Test.jsonl"),
        rows.choice,
        0.25,
    ),
    source="arXiv:1803.05457",
    summary="harder school science, the likeliest answer text",
)
_add(
    "piqa",
    AbilityTask("PIQA validation", ("bench_piqa_valid.jsonl", "piqa_valid.jsonl"), rows.piqa, 0.5),
    source="arXiv:1911.11641",
    summary="which of two ways reaches a goal",
)
_add(
    "winogrande",
    AbilityTask(
        "WinoGrande dev", ("bench_winogrande_dev.jsonl", "winogrande_dev.jsonl"), rows.winogrande, 0.5
    ),
    source="arXiv:1907.10641",
    summary="which of two names fits the gap",
)
_add(
    "openbookqa",
    AbilityTask(
        "OpenBookQA test", ("bench_openbookqa_test.jsonl", "openbookqa_test.jsonl"), rows.choice, 0.25
    ),
    source="arXiv:1809.02789",
    summary="elementary science, the likeliest answer text",
)
_add(
    "boolq",
    AbilityTask(
        "BoolQ dev, without passages", ("bench_boolq_dev_noctx.jsonl", "boolq_dev.jsonl"), rows.boolq, 0.5
    ),
    source="arXiv:1905.10044",
    summary="yes/no questions from memory",
)
_add(
    "social_iqa",
    AbilityTask(
        "SocialIQA dev", ("bench_social_iqa_dev.jsonl", "social_iqa_dev.jsonl"), rows.social_iqa, 1 / 3
    ),
    source="arXiv:1904.09728",
    summary="what people feel or do next",
)
_add(
    "lambada",
    AbilityTask(
        "LAMBADA test, OpenAI form", ("bench_lambada_test.jsonl.gz", "lambada_test.jsonl"), rows.lambada, None
    ),
    source="arXiv:1606.06031",
    summary="the last word of a passage",
)
