"""Run records made by hand, so that the tests of charts and pages need no model."""

import math
from pathlib import Path
from typing import Any

import torch

from nmke.evaluation.score_records import ScoreRecord
from nmke.events import EditRecord, Event
from nmke.run_folder import BaseInfo
from nmke.types import EditRequest, Neighbor
from nmke.viz.run_record import Batch, NeuronUse, RunRecord

LAYERS = (4, 5, 6)
HOSTILE = "</script><img src=x onerror=alert(1)>\"'&\u202e\x00 {{ 7*7 }}"


def request(number: int, **changes: Any) -> EditRequest:
    return EditRequest(
        **{
            "prompt": "The capital of {} is",
            "subject": f"Land {number}",
            "target_new": "Lyon",
            "id": f"e{number:05d}",
            "target_true": "Paris",
            "paraphrases": (f"Land {number} is governed from",),
            "neighborhood": (Neighbor("The capital of Italy is", "Rome"),),
            **changes,
        }
    )


def event(number: int, size: int, *, masks: bool = True, **changes: Any) -> Event:
    """An edit; every fifth fact fails, the first batch of all knows one fact."""
    records = []
    for i in range(size):
        place = (number - 1) * size + i
        status = "known" if number == 1 and i == 0 and size > 1 else "failed" if place % 5 == 4 else "written"
        detail = {"reason": "the model already says this"}
        if status != "known":
            detail = {"probability_before": 0.01, "probability_after": 0.9 if status == "written" else 0.3}
        if status == "failed":
            detail["reason"] = "no target value was found"
        records.append(EditRecord(request(place), status, detail))
    mask = {
        "general": 30.0, "specific": 20.0, "overlap": 10.0, "kept": 40.0, "d_mlp": 64.0,
        "general_entropy": 0.9, "specific_entropy": 0.8,
    }  # fmt: skip
    body = {
        "config": {"method": "nmke" if masks else "alphaedit", "mask": "entropy" if masks else "none", "seed": 0,
                   "layers": list(LAYERS), "batch_size": size, "kl_warn": 0.3, "kl_stop": 2.0, "attribution": "mpc",
                   "attribution_token": "subject", "placement": "in-solve"},
        "versions": {"nmke": "0.1.0", "torch": "2"},
        "seconds": {"targets": 4.0, "keys": 0.5, "solve": 0.1, "attribution": 0.0},
        "masks": {str(layer): mask for layer in LAYERS} if masks else {},
        "drift": {str(layer): 0.01 * layer * math.sqrt(number) for layer in LAYERS},
        "health": {"status": "ok" if number < 4 else "warn", "kl": 0.1 * number, "perplexity": 119.0 + number,
                   "perplexity_base": 118.5, "retention": None if number == 1 else 0.95,
                   "asked": 0 if number == 1 else 20,
                   "reached": 0.8, "reasons": [] if number < 4 else ["KL to the unedited model is 0.40, limit 0.3"]},
        **changes,
    }  # fmt: skip
    created = "2030-01-01T00:00:00+00:00"
    hashes = f"{number - 1:064d}", f"{number:064d}"
    return Event(number, f"b{number:08d}", "edit", created, body, {}, *hashes, "", "", tuple(records))


def run(batches: int = 4, size: int = 5, *, masks: bool = True, root: Path = Path("my-edits")) -> RunRecord:
    """A run of `batches` batches."""
    events = tuple(event(number + 1, size, masks=masks) for number in range(batches))
    active = tuple(Batch(one, i * size) for i, one in enumerate(events))
    counts = torch.arange(64) % (batches + 1)
    return RunRecord(
        root=root,
        base=BaseInfo("tiny", "tiny-model", "f" * 64, "float32"),
        created="2030-01-01T00:00:00+00:00",
        contexts=("", "The sun is. "),
        events=events,
        batches=active,
        held=tuple(r for one in events for r in one.edits if r.status != "known"),
        recipe="batch_size: 5\n",
        use={layer: NeuronUse(counts, batches) for layer in LAYERS} if masks else {},
    )


def scores(content_hash: str, reliability: float = 0.9, n: int = 20) -> ScoreRecord:
    """Teacher-forced scores of one state."""
    table = {
        "version": "teacher_forced/1", "reliability": reliability, "generalization": None, "locality": 0.8, "n": n,
        "intervals": {"reliability": [reliability - 0.1, reliability + 0.05], "locality": [0.7, 0.9]},
        "counts": {"reliability": n, "locality": 3 * n},
    }  # fmt: skip
    return ScoreRecord(content_hash, "00", n, "2030-01-01T00:00:00+00:00", {"teacher_forced": table})


def texts(**changes: str) -> list[dict[str, Any]]:
    """Probes of one fact with what the model said."""
    probe = {"edit_id": "e1", "target_new": "Lyon", **changes}
    same = {"before": {"text": "Paris.", "p_new": 0.01}, "after": {"text": "Paris.", "p_new": 0.01}}
    said = {"before": {"text": "Paris.", "p_new": 0.01}, "after": {"text": "Lyon, a city", "p_new": 0.9}}
    return [
        {"kind": "edit", "prompt": "The capital of France is", **probe, **said},
        {"kind": "paraphrase", "prompt": "France is governed from", **probe, **said, "after": said["before"]},
        {"kind": "neighbour", "prompt": "The capital of Italy is", **probe, **same},
        {"kind": "neighbour", "prompt": "The capital of Spain is", **probe, **said},
    ]  # fmt: skip


def stability() -> dict[str, Any]:
    """What is measured of the weights."""
    values = {"every": 2, "values": [4.0, 2.0, 1.0]}
    grown = {"every": 2, "values": [4.4, 2.0, 1.2]}
    numbers = {
        "relative_norm": 0.12, "wasserstein": 0.03, "mean_column_norm": 1.5, "cosine_mean": 0.99, "cosine_std": 0.01,
        "cosine_min": 0.8, "changed": 40, "columns": 64, "singular_before": values, "singular_after": grown,
        "spectral_growth": 1.1,
    }  # fmt: skip
    places = [[0.0, 0.1], [1.0, -1.0]]
    projection = {
        "layer": 6, "columns": 64, "farthest": 1, "index": [3, 9], "before": places, "after": [[0.5, 0.1], [1.0, -1.0]],
        "explained": [0.2, 0.1],
    }  # fmt: skip
    return {"layers": {str(layer): numbers for layer in LAYERS}, "projection": projection}
