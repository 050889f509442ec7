"""One task on one model: choose questions, run the harness in this process, keep a value for every question."""

from __future__ import annotations

import contextlib
import io
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nmke.errors import ConfigError, RequestError
from nmke.evaluation.ability.rows import GROUP, Row, bbh_examples
from nmke.evaluation.ability.tasks import AbilityTask, ability_tasks, prompt_file, required_file
from nmke.evaluation.metrics import Estimate, exp_mean_interval, mean_interval
from nmke.facts.reader import file_sha256
from nmke.facts.rows import open_rows

if TYPE_CHECKING:
    from nmke.models.load import EditableModel


@dataclass(frozen=True)
class AbilityScores:
    """What a model scored on one task.

    Args:
        task: Name in `ability_tasks`, or "wikitext" and the like.
        title: What it is, in words.
        version: Name and version of prompt and scoring.
        metrics: Estimate of each, the most telling first.
        values: Per metric one value a question, in the questions' order.
        n: How many questions.
        data: sha256 of the data file.
        chance: What guessing scores on the first metric, None where it hits nothing.
        seconds: What it took.
    """

    task: str
    title: str
    version: str
    metrics: Mapping[str, Estimate]
    values: Mapping[str, tuple[float, ...]]
    n: int
    data: str
    chance: float | None = None
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """The scores as in `--json`: without the single values."""
        return {
            "title": self.title,
            "version": self.version,
            **{name: estimate.mean for name, estimate in self.metrics.items()},
            "n": self.n,
            "intervals": {name: [e.low, e.high] for name, e in self.metrics.items()},
            "chance": self.chance,
            "data_sha256": self.data,
            "seconds": self.seconds,
        }


def measure(model: EditableModel, name: str, *, limit: int | None = None, seed: int = 0) -> AbilityScores:
    """The model's scores on one task.

    Args:
        model: The model as it is now.
        name: A name out of `ability_tasks`.
        limit: Ask so many questions, drawn by the seed and spread evenly over a task's parts; None asks all.
        seed: Of the draw and of the bootstrap intervals.

    Raises:
        ConfigError: If the task is unknown, or the harness is not installed.
        RequestError: If the data file is not on this machine, or is malformed.
    """
    task = ability_tasks.get(name)
    path = required_file(name, task.find(), task.files)
    begun = time.perf_counter()
    chosen = select(read_rows(task, path), limit, seed)
    shots = read_rows(task, required_file(name, task.find_shots(), task.shot_files)) if task.shots else []
    prompt = prompt_file(name)
    values = _run(model, prompt, chosen, shots[: task.shots])
    version = f"{prompt['task']}/{prompt['metadata']['version']}"
    return AbilityScores(
        name,
        task.title,
        version,
        {metric: _estimate(metric, found, seed) for metric, found in values.items()},
        values,
        len(chosen),
        file_sha256(path),
        task.chance,
        time.perf_counter() - begun,
    )


def read_rows(task: AbilityTask, path: Path) -> list[Row]:
    """Every row of a task's data file.

    Raises:
        RequestError: If a record is not of a known shape; names the line.
    """
    found: list[Row] = []
    with open_rows(path) as (_, records):
        for record in records:
            data = [record.data]
            if "examples" in record.data:
                data = list(bbh_examples(record.data, path.stem))
            try:
                found += [task.row(item) for item in data]
            except (KeyError, ValueError, TypeError, IndexError) as error:
                raise RequestError(
                    f"{path}, line {record.line}: no record of {task.title} ({error!r}); fetch the file again"
                ) from error
    return found


def select(rows: Sequence[Row], limit: int | None, seed: int) -> list[Row]:
    """So many rows, drawn by the seed, evenly over the parts of a task; in the file's order."""
    if limit is None or limit >= len(rows):
        return list(rows)
    parts: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        parts.setdefault(str(row.get(GROUP, "")), []).append(index)
    generator = random.Random(seed)
    for name in sorted(parts):
        generator.shuffle(parts[name])
    order = sorted(parts)
    generator.shuffle(order)
    turns = max(map(len, parts.values()))
    spread = [parts[name][turn] for turn in range(turns) for name in order if turn < len(parts[name])]
    return [rows[index] for index in sorted(spread[:limit])]


def _run(
    model: EditableModel, prompt: dict[str, Any], rows: Sequence[Row], shots: Sequence[Row]
) -> dict[str, tuple[float, ...]]:
    """Per metric one value a row."""
    try:
        import datasets
        from lm_eval.api.task import ConfigurableTask
        from lm_eval.evaluator import evaluate
    except ImportError as error:
        raise ConfigError(
            f"general ability needs lm-evaluation-harness ({error}); install it: pip install 'nmke[eval]'"
        ) from error
    from nmke.evaluation.ability.lm import HarnessModel

    def in_memory(**_: Any) -> Any:
        parts = {"test": rows, **({"train": shots} if shots else {})}
        return datasets.DatasetDict({n: datasets.Dataset.from_list(list(part)) for n, part in parts.items()})

    metrics = [item["metric"] for item in prompt["metric_list"]]
    with _undisturbed():
        task = ConfigurableTask(config={**prompt, "custom_dataset": in_memory})
        done = evaluate(HarnessModel(model), {prompt["task"]: task}, bootstrap_iters=0, log_samples=True)
    samples = sorted(done["samples"][prompt["task"]], key=lambda sample: sample["doc_id"])
    return {metric: tuple(float(sample[metric]) for sample in samples) for metric in metrics}


def _estimate(metric: str, values: Sequence[float], seed: int) -> Estimate:
    """A mean with its interval; perplexity is exp of the mean loss, its values being log-probabilities."""
    if metric != "perplexity":
        return mean_interval(values, seed)
    return exp_mean_interval([-value for value in values], [1.0] * len(values), seed)


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """The harness without progress bars and log lines of its own, and without a change to random states."""
    import logging

    import torch
    from datasets.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

    logger, bars = logging.getLogger("lm_eval"), is_progress_bar_enabled()
    level = logger.level
    logger.setLevel(logging.ERROR)
    disable_progress_bar()
    states = random.getstate(), torch.random.get_rng_state()
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # the harness draws its bars whether asked or not
            yield
    finally:
        random.setstate(states[0])
        torch.random.set_rng_state(states[1])
        logger.setLevel(level)
        if bars:
            enable_progress_bar()
