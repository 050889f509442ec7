"""What the findings share: the model, two disjoint samples of facts, pieces that survive being killed, intervals.

Every finding is one command, made of pieces that are kept under build/findings as they are done: run it again
after an interruption and it goes on. The record in benchmarks/results is written when all pieces are there; with
`--kept` it is written from the pieces that are there now, and says which are missing.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.append(str(REPOSITORY / "benchmarks"))  # record.py stands beside this folder

from nmke.config import EditConfig  # noqa: E402
from nmke.errors import RequestError  # noqa: E402
from nmke.evaluation.metrics import mean_interval  # noqa: E402
from nmke.facts import data_path, read_facts  # noqa: E402
from nmke.models.load import EditableModel, load_model  # noqa: E402
from nmke.neurons import survey  # noqa: E402
from nmke.types import EditRequest, Scores  # noqa: E402

MODEL = "smollm2-135m"
FACTS = "counterfact_full500.jsonl"
SHUFFLE = 20_251_022  # the same order of facts in every finding
SEEDS = (0, 1)
LAYERS_AT_ONCE = 6
DONE = REPOSITORY / "build" / "findings"
Json = dict[str, Any]


def model(dtype: str = "float32") -> EditableModel:
    """The default model on one thread."""
    torch.set_num_threads(1)
    return load_model(MODEL, dtype=dtype)


def need(name: str) -> Path:
    """A data file.

    Raises:
        RequestError: If it is not on this machine.
    """
    path = data_path(name)
    if path is None:
        raise RequestError(f"{name} was not found; point NMKE_DATA at a folder that holds it")
    return path


def facts(seed: int, count: int) -> list[EditRequest]:
    """`count` CounterFact facts; the samples of seeds 0 and 1 share none."""
    every = list(read_facts(need(FACTS)).requests)
    random.Random(SHUFFLE).shuffle(every)
    half = len(every) // 2
    return every[seed * half : seed * half + count]


class NotKept(Exception):
    """A piece is not there, and only those that are there are wanted."""


class Pieces:
    """Results that are kept as they come, one JSON file each.

    Args:
        finding: Name of the finding.
    """

    def __init__(self, finding: str) -> None:
        self.folder = DONE / finding
        self.folder.mkdir(parents=True, exist_ok=True)
        self.only_kept = "--kept" in sys.argv[1:]
        self.missing: list[str] = []

    @contextmanager
    def optional(self) -> Iterator[None]:
        """A cell that is left out when a piece of it is missing and only kept ones are wanted."""
        with suppress(NotKept):
            yield

    def get(self, name: str, make: Callable[[], Json]) -> Json:
        """The piece called `name`, made now unless it is there; says how long it took.

        Raises:
            NotKept: If it is not there and only kept ones are wanted.
        """
        path = self.folder / f"{name}.json"
        if not path.is_file() and self.only_kept:
            self.missing.append(name)
            raise NotKept(name)
        if not path.is_file():
            start = time.perf_counter()
            content = make() | {"piece_seconds": round(time.perf_counter() - start, 1)}
            temporary = path.with_suffix(".part")
            temporary.write_text(json.dumps(content), encoding="utf-8")
            temporary.replace(path)
            print(f"{name}: {content['piece_seconds']} s", flush=True)
        return dict(json.loads(path.read_text(encoding="utf-8")))


def surveyed(
    lazy: Lazy, seed: int, count: int, token: str, metric: str, target: str = "predicted"
) -> dict[int, Scores]:
    """Scores of every neuron of every layer for the bare prompts of the seed's facts, kept between runs."""
    folder = DONE / "scores"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{metric}-{token}-{target}-{seed}-{count}.safetensors"
    if not path.is_file():
        config = EditConfig.create(attribution_token=token, attribution_target=target)
        every: dict[str, Scores] = {}
        for number, layers in enumerate(chunks(range(lazy.model.layout.n_layers), LAYERS_AT_ONCE)):
            part = folder / f"{path.stem}.part{number}.safetensors"
            if not part.is_file():
                found = survey(lazy.model, facts(seed, count), ("",), [metric], config, layers)
                order = sorted(range(count), key=lambda row: found.facts[row])
                assert [found.facts[row] for row in order] == list(range(count))  # one bare prompt per fact
                save_file({str(i): scores[order] for i, scores in found.scores[metric].items()}, part)
                print(f"scored {part.stem}: {found.seconds[metric]:.0f} s", flush=True)
            every |= load_file(part)
        save_file(every, path)
    return {int(layer): scores for layer, scores in sorted(load_file(path).items(), key=lambda p: int(p[0]))}


class Lazy:
    """The model, loaded when first needed: a finding whose pieces are all there needs none."""

    def __init__(self, dtype: str = "float32") -> None:
        self._dtype = dtype
        self._model: EditableModel | None = None

    @property
    def model(self) -> EditableModel:
        """The model."""
        if self._model is None:
            self._model = model(self._dtype)
        return self._model


def estimate(values: Sequence[float]) -> Json:
    """Mean, 95 % bootstrap interval and n of independent values."""
    return asdict(mean_interval(list(values)))


def averages(rows: Sequence[Mapping[str, float]]) -> dict[str, Json]:
    """An estimate of every column of a table."""
    return {name: estimate([row[name] for row in rows]) for name in rows[0]} if rows else {}


def chunks(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """The items in parts of at most `size`."""
    return (items[start : start + size] for start in range(0, len(items), size))
