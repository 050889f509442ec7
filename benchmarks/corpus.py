"""Which text should key statistics come from: what the model writes itself, or WikiText?

100 CounterFact edits (records 100-199 of counterfact_full500) in one batch on smollm2-135m, AlphaEdit and NMKE.
Target values do not depend on the corpus, so they are optimised once; then, for every corpus and token count,
the edit is solved, scored (teacher-forced) and the perplexity on held-out WikiText-2 test is taken.

    python benchmarks/corpus.py [--edits 100]
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

import torch

from nmke.config import EditConfig
from nmke.editors import methods
from nmke.editors.contexts import write_contexts
from nmke.editors.known_targets import given
from nmke.editors.method import Batch
from nmke.editors.pipeline import ProvisionalWrites, compute_updates
from nmke.editors.targets import optimise_targets
from nmke.evaluation.base_outputs import collect_base
from nmke.evaluation.perplexity import perplexity
from nmke.evaluation.protocols import score
from nmke.facts import data_path, read_facts
from nmke.models.load import load_model
from nmke.stats.corpus import read_corpus
from nmke.stats.covariance import LayerStats
from nmke.stats.store import CorpusSpec, StatsStore
from record import write_record

LAYERS = (4, 5, 6, 7, 8)
METHODS = {"alphaedit": {}, "nmke-linear, one mask per batch": {"mask_scope": "batch"}}
TOKENS = (10_000, 30_000, 100_000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--edits", type=int, default=100)
    parser.add_argument("--held-out-tokens", type=int, default=8_000)
    asked = parser.parse_args()
    paths = {
        n: data_path(n)
        for n in ("counterfact_full500.jsonl", "text_wikitext2_valid.jsonl", "text_wikitext2_test.jsonl")
    }
    missing = [name for name, path in paths.items() if path is None]
    if missing:
        sys.exit(f"{missing} not found; point NMKE_DATA at a folder that holds them")
    facts, valid, test = paths.values()
    model = load_model("smollm2-135m")
    requests = read_facts(facts, offset=100, limit=asked.edits).requests
    held_out = read_corpus(str(test), asked.held_out_tokens * 6).texts
    base = collect_base(model, requests)
    contexts = write_contexts(model)
    start = time.perf_counter()
    targets = optimise_targets(
        model, requests, contexts, LAYERS[-1:], "block", EditConfig.create(layers=LAYERS)
    )
    seconds = time.perf_counter() - start
    before = perplexity(model, held_out, max_tokens=asked.held_out_tokens)
    print(f"targets {seconds:.0f} s, perplexity before {before:.2f}", flush=True)
    cells: list[dict[str, Any]] = []
    for source in ("self", str(valid)):
        for tokens in TOKENS:
            if source == "self" and tokens > 30_000:
                continue  # writing it costs more than a user would wait for on two cores
            start = time.perf_counter()
            gathered = StatsStore().prepare(model, LAYERS, CorpusSpec(source, tokens))
            prepared = time.perf_counter() - start
            for name, asked_for in METHODS.items():
                method = methods.get(name.partition(",")[0])
                config = method.fill(
                    EditConfig.create(method=name.partition(",")[0], layers=LAYERS, **asked_for)
                )
                stats = {i: LayerStats(c.moment) for i, c in gathered.items()}
                batch = Batch(model, requests, contexts, config, stats=stats, find_targets=given(targets))
                result = compute_updates(method, batch)
                with ProvisionalWrites(model) as writes, torch.no_grad():
                    for update in result.updates:
                        writes.add(update)
                    scores = score(model, requests, base).to_json()["teacher_forced"]
                    after = perplexity(model, held_out, max_tokens=asked.held_out_tokens)
                cell = {
                    "corpus": "self" if source == "self" else "wikitext2-valid",
                    "tokens": tokens,
                    "method": name,
                    "prepare_seconds": round(prepared, 1),
                    "null_space_kept": {i: s.projector.kept for i, s in stats.items()},
                    "scores": scores,
                    "perplexity": after,
                    "perplexity_before": before,
                }
                cells.append(cell)
                print(
                    f"{cell['corpus']:16s} {tokens:7d} {name:10s} Rel {scores['reliability']:.3f} "
                    f"Gen {scores['generalization']:.3f} Loc {scores['locality']:.3f} ppl {after:.2f}  "
                    f"prepare {prepared:.0f} s",
                    flush=True,
                )
                write_record(
                    "corpus",
                    {"setup": {"edits": len(requests), "batch": "one", "layers": LAYERS}, "cells": cells},
                )


if __name__ == "__main__":
    main()
