"""Cell records made by hand, for the tests of what reads them."""

from collections.abc import Sequence
from typing import Any

from nmke.bench.record import CellRecord, Checkpoint
from nmke.evaluation.metrics import mean_interval


def score(values: Sequence[float | None]) -> dict[str, Any]:
    """A score as the record holds it."""
    estimate = mean_interval([value for value in values if value is not None])
    return {
        "value": estimate.mean,
        "low": estimate.low,
        "high": estimate.high,
        "n": estimate.n,
        "prompts": estimate.n,
        "per_fact": list(values),
    }


def checkpoint(
    reliability: Sequence[float | None],
    locality: Sequence[float | None] | None = None,
    *,
    generalization: Sequence[float | None] | None = None,
    perplexity: float = 26.0,
    kl: float = 0.1,
    seconds: float = 2.5,
) -> Checkpoint:
    """A checkpoint whose scores at both times are these, generalization missing unless it is given."""
    metrics = {
        "reliability": score(reliability),
        "generalization": None if generalization is None else score(generalization),
        "locality": score(locality or [1.0] * len(reliability)),
    }
    scores = {"teacher_forced": {"version": "teacher_forced/1", "metrics": metrics}}
    return Checkpoint.model_validate(
        {
            "n_edits": len(reliability),
            "n_written": len(reliability),
            "n_known": 0,
            "n_failed": 0,
            "after_batch": scores,
            "after_last": scores,
            "held_out": {
                "text": "wikitext2-test",
                "sha256": "00",
                "tokens": 100,
                "perplexity": perplexity,
                "perplexity_base": 25.5,
                "kl": kl,
                "kl_positions": 50,
            },
            "drift": {4: 0.1, 5: 0.2},
            "neurons_kept": 0.5,
            "cost": {
                "seconds_per_edit": seconds,
                "cpu_seconds_per_edit": seconds,
                "stages": {"targets": seconds},
                "load_average": (0.5, 1.5),
                "peak_memory_mb": 1500.0,
                "memory_of": "process",
            },
            "content_hash": "00",
        }
    )


def cell(
    label: str = "nmke",
    *,
    points: Sequence[Checkpoint] = (),
    ids: Sequence[str] | None = None,
    status: str = "done",
    seed: int = 0,
    batch_size: int = 10,
    dataset: str = "counterfact",
    facts_hash: str = "ff",
    **changes: Any,
) -> CellRecord:
    """A cell with these checkpoints."""
    names = ids if ids is not None else [f"f{i}" for i in range(points[-1].n_edits if points else 0)]
    identity = {
        "id": f"{dataset}-b{batch_size}-s{seed}-{label}",
        "label": label,
        "method": label.partition("[")[0],
        "source": "arXiv:0000.00000",
        "variant": {},
        "settings": {},
        "model": {"source": "tiny", "name": "tiny", "fingerprint": "aa", "dtype": "float32", "device": "cpu"},
        "stream": {
            "dataset": dataset,
            "file_sha256": "bb",
            "start": 0,
            "stop": None,
            "order": "file",
            "complete": True,
            "derived": False,
            "facts_hash": facts_hash,
            "ids": list(names),
        },
        "batch_size": batch_size,
        "seed": seed,
        "checkpoints": [point.n_edits for point in points],
        "protocols": {"teacher_forced": "teacher_forced/1"},
    }
    return CellRecord.model_validate(
        {
            "schema": "nmke.bench_cell/1",
            "identity": identity,
            "status": status,
            "created": "2030-01-01T00:00:00+00:00",
            "updated": "2030-01-01T00:00:00+00:00",
            "machine": {"processor": "test"},
            "versions": {"nmke": "0"},
            "checkpoints": list(points),
            **changes,
        }
    )
