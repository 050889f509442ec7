"""Which neurons should an edit write into? The same targets, solved under different masks, scored after the last edit.

Targets are joint and optimised once, on the unedited model, so that all that differs between two cells is the
mask. Facts are CounterFact records that no table of results uses (from index 10,000 on; paraphrases are the
derived ones of that file, at most two, and four neighbours). Batches are written one after another with the keys of
earlier ones in the system.

    python benchmarks/research/edit_masks.py [--edits 40] [--batch-size 40] [--first 10000] [--name edit_masks]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from common import facts, joint_targets

from nmke.config import EditConfig
from nmke.editors import methods
from nmke.editors.contexts import write_contexts
from nmke.editors.known_targets import given
from nmke.editors.memory import SolverState
from nmke.editors.method import Batch
from nmke.editors.pipeline import ProvisionalWrites, compute_updates
from nmke.editors.targets import Targets
from nmke.evaluation.base_outputs import collect_base
from nmke.evaluation.perplexity import perplexity
from nmke.evaluation.protocols import score
from nmke.facts import data_path
from nmke.models.load import EditableModel, load_model
from nmke.stats.corpus import read_corpus
from nmke.stats.covariance import LayerStats
from nmke.stats.store import CorpusSpec, StatsStore
from nmke.types import EditRequest
from record import write_record

LAYERS = (4, 5, 6, 7, 8)
HELD_OUT_TOKENS = 6_000
CELLS: dict[str, dict[str, Any]] = {
    "none": {"mask": "none"},
    "none, least squares": {"mask": "none", "residual_ridge": 1.0},
    "entropy, write direction": {},
    "10 %, write direction": {"mask": "fixed", "ratio": 0.1},
    "10 %, key energy over covariance": {"mask": "fixed", "ratio": 0.1, "attribution": "energy"},
    "10 %, coefficient": {"mask": "fixed", "ratio": 0.1, "attribution": "mpc"},
    "10 %, random, seed 0": {"mask": "random", "ratio": 0.1},
    "10 %, random, seed 1": {"mask": "random", "ratio": 0.1, "seed": 1},
    "3 %, write direction": {"mask": "fixed", "ratio": 0.03},
    "3 %, random, seed 0": {"mask": "random", "ratio": 0.03},
    "one mask per batch": {"mask_scope": "batch"},
    "one random mask per batch": {"mask_scope": "batch", "mask": "random"},
}


def write_all(
    model: EditableModel,
    batches: Sequence[tuple[list[EditRequest], Targets]],
    contexts: Sequence[str],
    stats: dict[int, LayerStats],
    settings: dict[str, Any],
    writes: ProvisionalWrites,
) -> float | None:
    """Write every batch; the mean share of neurons that a single edit or, without that, a batch may change."""
    method = methods.get("nmke-linear")
    asked = {"targets": "joint", **settings}
    config = method.fill(EditConfig.create(method="nmke-linear", layers=LAYERS, **asked))
    state, shares = SolverState(), []
    for turn, (requests, targets) in enumerate(batches):
        batch = Batch(
            model,
            requests,
            contexts,
            config,
            stats=stats,
            turn=turn,
            state=state,
            find_targets=given(targets),
        )
        result = compute_updates(method, batch)
        for update in result.updates:
            writes.add(update)
            if update.mask is not None:
                detail = update.mask.detail
                shares.append(detail.get("kept_per_edit", detail["kept"]) / detail["d_mlp"])
        state = state.remember(result.memory_keys)
    return sum(shares) / len(shares) if shares else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--edits", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=40)
    parser.add_argument("--first", type=int, default=10_000)
    parser.add_argument("--only", nargs="*", default=list(CELLS))
    parser.add_argument("--name", default="edit_masks")
    asked = parser.parse_args()
    held_out = data_path("text_wikitext2_test.jsonl")
    if held_out is None:
        sys.exit("text_wikitext2_test.jsonl not found; point NMKE_DATA at a folder that holds it")
    model = load_model("smollm2-135m")
    requests = facts(asked.first, asked.edits)
    texts = read_corpus(str(held_out), HELD_OUT_TOKENS * 6).texts
    contexts = write_contexts(model)
    base = collect_base(model, requests)
    gathered = StatsStore().prepare(model, LAYERS, CorpusSpec("self", 30_000))
    stats = {layer: LayerStats(total.moment) for layer, total in gathered.items()}
    config = methods.get("nmke-linear").fill(EditConfig.create(method="nmke-linear", layers=LAYERS))
    starts = range(0, len(requests), asked.batch_size)
    parts = [requests[start : start + asked.batch_size] for start in starts]
    batches = [(part, joint_targets(model, part, contexts, LAYERS, config)) for part in parts]
    setup = {
        "model": "smollm2-135m", "facts": f"counterfact {asked.first}-", "edits": len(requests),
        "batch_size": asked.batch_size, "layers": LAYERS, "steps": config.steps, "lr": config.lr,
        "stop_loss": config.stop_loss, "protocol": "teacher_forced, after the last edit; derived paraphrases",
        "perplexity_before": perplexity(model, texts, max_tokens=HELD_OUT_TOKENS),
        "mean_steps": sum(sum(t.steps) for _, t in batches) / len(requests),
    }  # fmt: skip
    cells: dict[str, Any] = {}
    for name in asked.only:
        with ProvisionalWrites(model) as writes:
            share = write_all(model, batches, contexts, stats, CELLS[name], writes)
            scores = score(model, requests, base).to_json()["teacher_forced"]
            after = perplexity(model, texts, max_tokens=HELD_OUT_TOKENS)
        cells[name] = {"settings": CELLS[name], "share": share, "scores": scores, "perplexity": after}
        numbers = [scores[m] for m in ("reliability", "generalization", "locality")]
        print(f"{name:34s} " + " ".join(f"{n:.3f}" for n in numbers) + f"  ppl {after:.2f}", flush=True)
        write_record(f"research_{asked.name}", {"setup": setup, "cells": cells})


if __name__ == "__main__":
    main()
