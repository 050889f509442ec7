"""What `--tasks` names: edits, texts and general ability, before and after, the unedited model asked only once."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nmke.errors import ConfigError, unknown_name
from nmke.evaluation import fluency
from nmke.evaluation.ability import AbilityScores, ability_tasks, measure
from nmke.evaluation.held_out import wikitext
from nmke.evaluation.metrics import Estimate, paired_difference
from nmke.models.cache import atomic_file, cache_dir
from nmke.types import EditCase

if TYPE_CHECKING:
    from nmke.models.load import EditableModel
    from nmke.session import EditSession

EDITS = "edits"
GENERAL = "general"
FLUENCY, WIKITEXT = "fluency", "wikitext"
SCHEMA = "nmke.ability/1"
UNPAIRED = ("perplexity", "kl")


@dataclass(frozen=True)
class Comparison:
    """One task, before and after.

    Args:
        before: Scores of the unedited model; None when there is no edited one to compare it with.
        after: Scores of the model as it is now.
        change: Per metric the mean change of the same questions, with its interval.
    """

    before: AbilityScores | None
    after: AbilityScores
    change: Mapping[str, Estimate]

    def to_json(self) -> dict[str, Any]:
        """Scores after, and before and change where there are any."""
        if self.before is None:
            return {"after": self.after.to_json()}
        changes = {
            name: {"mean": e.mean, "interval": [e.low, e.high], "n": e.n} for name, e in self.change.items()
        }
        return {"before": self.before.to_json(), "after": self.after.to_json(), "change": changes}


def task_names() -> tuple[str, ...]:
    """Every task that can be asked for, besides "edits" and "general"."""
    return (FLUENCY, WIKITEXT, *ability_tasks.names())


def read_tasks(text: str) -> tuple[str, ...]:
    """Task names out of a flag; "general" stands for every task of general ability and wikitext.

    Raises:
        ConfigError: If one is unknown; names the nearest.
    """
    found: list[str] = []
    for name in (part.strip() for part in text.split(",")):
        if name == GENERAL:
            found += [WIKITEXT, *ability_tasks.names()]
        elif name in (EDITS, *task_names()):
            found.append(name)
        elif name:
            raise ConfigError(unknown_name("task", name, (EDITS, GENERAL, *task_names())))
    if not found:
        raise ConfigError(f"no task in {text!r}; name some of {EDITS}, {GENERAL}, {', '.join(task_names())}")
    return tuple(dict.fromkeys(found))


def measure_model(
    model: EditableModel,
    name: str,
    cases: Sequence[EditCase] = (),
    *,
    limit: int | None = None,
    seed: int = 0,
) -> Comparison:
    """A task on a model that was never edited."""
    return Comparison(None, _unedited(model, name, cases, limit, seed), {})


def compare(
    session: EditSession,
    name: str,
    cases: Sequence[EditCase] = (),
    *,
    limit: int | None = None,
    seed: int = 0,
) -> Comparison:
    """A task on the session's model as it is now, beside the unedited model.

    Args:
        session: An open run.
        name: A name out of `task_names`.
        cases: What was edited; needed for fluency.
        limit: Questions, windows or cases at most.
        seed: Of draws and intervals.
    """
    with session.base():
        before = _unedited(session.model, name, cases, limit, seed)
        told = fluency.references(session.model, cases[:limit], seed) if name == FLUENCY else None
    if name == WIKITEXT:
        after = wikitext(session.model, limit=limit, seed=seed, base=session.base)
    elif name == FLUENCY:
        after = fluency.write_and_judge(session.model, cases[:limit], told, seed=seed)
    else:
        after = measure(session.model, name, limit=limit, seed=seed)
    change = {
        metric: paired_difference(after.values[metric], before.values[metric], seed)
        for metric in before.values
        if metric in after.values and metric not in UNPAIRED
    }
    return Comparison(before, after, change)


def _unedited(
    model: EditableModel, name: str, cases: Sequence[EditCase], limit: int | None, seed: int
) -> AbilityScores:
    """Scores of the unedited model, from the cache where they were measured before."""
    if name == FLUENCY:
        some = cases[:limit]
        return fluency.write_and_judge(model, some, fluency.references(model, some, seed), seed=seed)
    if name == WIKITEXT:
        return _cached(model, name, limit, seed, lambda: wikitext(model, limit=limit, seed=seed))
    return _cached(model, name, limit, seed, lambda: measure(model, name, limit=limit, seed=seed))


def _cached(
    model: EditableModel, name: str, limit: int | None, seed: int, run: Callable[[], AbilityScores]
) -> AbilityScores:
    """What `run` gives, kept by weights, type, device, task, data, limit and seed."""
    key = json.dumps(
        [SCHEMA, model.fingerprint, str(model.dtype), model.device.type, *_facts(name), limit, seed]
    )
    path = cache_dir() / "scores" / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:24]}.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # damaged: measured again
        return _load(path)
    found = run()
    with contextlib.suppress(OSError), atomic_file(path) as temporary:
        temporary.write_text(json.dumps({"schema": SCHEMA, **asdict(found)}), encoding="utf-8")
    return found


def _facts(name: str) -> Iterator[str]:
    """What decides a task's numbers beside the model: version of prompt and scoring, data."""
    from nmke.evaluation import held_out
    from nmke.evaluation.ability.tasks import prompt_file
    from nmke.facts import data_path
    from nmke.facts.reader import file_sha256

    if name == WIKITEXT:
        yield held_out.VERSION
        files: list[Path | None] = [data_path(file) for file in held_out.FILES]
    else:
        task = ability_tasks.get(name)
        yield json.dumps(prompt_file(name), sort_keys=True)
        files = [task.find(), task.find_shots()]
    yield from (file_sha256(path) for path in files if path is not None)


def _load(path: Path) -> AbilityScores:
    content = json.loads(path.read_text(encoding="utf-8"))
    if content.pop("schema") != SCHEMA:
        raise ValueError("of another schema")
    content["metrics"] = {name: Estimate(**estimate) for name, estimate in content["metrics"].items()}
    content["values"] = {name: tuple(values) for name, values in content["values"].items()}
    return AbilityScores(**content)
