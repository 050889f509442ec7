"""What do sets, metrics, temperature, amplification, ratio range and layers mean for the edits themselves?

Twenty CounterFact facts per seed, one batch, layers 4 to 8. The target values are found once per seed (and choice
of layers); every setting then solves for the same targets, `nmke`'s in-solve placement, so that the mask is all that
differs. Controls: no mask, and random masks of the same sizes. Teacher-forced reliability, generalization (two
true paraphrases) and locality (four neighbours each) right after the batch, perplexity on the
held-out text that ships with the package. One mask per layer for the whole batch.

    python benchmarks/findings/quality.py
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from itertools import product
from typing import Any

import torch
from common import DONE, SEEDS, Json, Lazy, Pieces, estimate, facts

from nmke.batches import resolve
from nmke.config import EditConfig
from nmke.editors import methods
from nmke.editors.contexts import write_contexts
from nmke.editors.known_targets import given
from nmke.editors.method import Batch
from nmke.editors.pipeline import ProvisionalWrites, compute_updates
from nmke.editors.rows import with_second_anchors
from nmke.editors.targets import Targets, optimise_targets
from nmke.evaluation.base_outputs import collect_base
from nmke.evaluation.perplexity import perplexity
from nmke.evaluation.protocols import score
from nmke.health import heldout_texts
from nmke.progress import quiet
from nmke.run_stats import RunStats
from nmke.stats.store import StatsStore
from nmke.types import EditRequest
from record import write_record

FACTS, NEIGHBOURS = 20, 4
EDITED = (4, 5, 6, 7, 8)
ELSEWHERE = ((12, 13, 14, 15, 16), (20, 21, 22, 23, 24))
SUBJECT = {"attribution": "mpc", "attribution_token": "subject"}
LAST = {"attribution": "lps", "attribution_token": "last"}
SCORES: dict[str, dict[str, Any]] = {
    "mpc at subject": SUBJECT,
    "lps at last": LAST,
    "gradient at subject": {"attribution": "gradient", "attribution_token": "subject"},
    "gradient to new answer at subject": {
        "attribution": "gradient",
        "attribution_token": "subject",
        "attribution_target": "new",
    },
}
SETS = ("entropy", "general", "specific", "overlap", "non-overlap")


def settings() -> dict[str, dict[str, Any]]:
    """Every setting by its name."""
    found: dict[str, dict[str, Any]] = {"no mask": {"mask": "none"}}
    for name, mask in product(("mpc at subject", "lps at last"), SETS):
        found[f"{name}, {mask}"] = {**SCORES[name], "mask": mask}
    for name in ("gradient at subject", "gradient to new answer at subject"):
        found[f"{name}, entropy"] = {**SCORES[name], "mask": "entropy"}
    for ratio in (0.15, 0.3, 0.45):
        found[f"random, {ratio:g}"] = {"mask": "random", "ratio": ratio}
    for name, setting in (("mpc at subject", SUBJECT), ("lps at last", LAST)):
        found[f"{name}, temperature 1"] = {**setting, "mask": "entropy", "temperature": 1.0}
        found[f"{name}, released range"] = {**setting, "mask": "entropy", "variant": "released"}
        found[f"{name}, fixed range"] = {**setting, "mask": "fixed"}
    for value in (1.0, 300.0):
        found[f"lps at last, amplification {value:g}"] = {**LAST, "mask": "entropy", "amplification": value}
    return found


def requests(seed: int) -> list[EditRequest]:
    """The seed's facts, each with its first neighbours."""
    return [replace(r, neighborhood=r.neighborhood[:NEIGHBOURS]) for r in facts(seed, FACTS)]


class Bench:
    """Targets and statistics of one seed and choice of layers."""

    def __init__(self, lazy: Lazy, seed: int, layers: Sequence[int]) -> None:
        self.lazy, self.seed, self.layers = lazy, seed, tuple(layers)
        self.facts = requests(seed)
        self._stats: RunStats | None = None

    def config(self, **changes: Any) -> EditConfig:
        """Settings of an edit."""
        asked = EditConfig.create(
            method="nmke-linear",
            layers=self.layers,
            seed=self.seed,
            mask_scope="batch",
            targets="spread",
            **changes,
        )
        return resolve(asked, self.lazy.model)

    def targets(self) -> Targets:
        """Target values of the facts, kept between runs."""
        path = DONE / "targets" / f"{self.seed}-{self.layers[0]}-{FACTS}.pt"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            model, contexts = self.lazy.model, write_contexts(self.lazy.model)
            asked, _ = with_second_anchors(model, self.facts)
            found = optimise_targets(model, asked, contexts, self.layers[-1:], "block", self.config())
            torch.save(asdict(found), path)
            print(f"targets {path.stem}", flush=True)
        return Targets(**torch.load(path, weights_only=True))

    def run(self, changes: dict[str, Any]) -> Json:
        """One setting: edit, score, take back."""
        model, config = self.lazy.model, self.config(**changes)
        self._stats = self._stats or RunStats(model, nullcontext, StatsStore())
        batch = Batch(
            model,
            self.facts,
            write_contexts(model),
            config,
            stats=self._stats.of(config, quiet),
            find_targets=given(self.targets()),
        )
        result = compute_updates(methods.get("nmke-linear"), batch)
        base = collect_base(model, self.facts)
        with ProvisionalWrites(model) as writes:
            for update in result.updates:
                writes.add(update)
            table = score(model, self.facts, base)
            text = perplexity(model, heldout_texts())
        kept = [mask.ratio for mask in result.masks.values()]
        ratios = [m.detail["general_ratio"] for m in result.masks.values() if m.detail]
        return {
            "kept": sum(kept) / len(kept) if kept else 1.0,
            "general_ratio": sum(ratios) / len(ratios) if ratios else None,
            "perplexity": text,
            "rows": table.rows_to_json(),
        }


def cell(found: Json) -> Json:
    """Means with intervals."""
    content = {name: found[name] for name in ("kept", "general_ratio", "perplexity")}
    for metric in ("reliability", "generalization", "locality"):
        values = [row["teacher_forced"].get(metric) for row in found["rows"]]
        content[metric] = estimate([value for value in values if value is not None])
    return content


def main() -> None:
    """Measure and write the record."""
    pieces, lazy = Pieces("quality"), Lazy()
    cells: Json = {}
    for seed in SEEDS:
        bench = Bench(lazy, seed, EDITED)
        cell_of: Json = {}
        with pieces.optional():
            plain = pieces.get(
                f"{seed}-unedited", lambda: {"perplexity": perplexity(lazy.model, heldout_texts())}
            )
            cell_of["unedited"] = {"perplexity": plain["perplexity"]}
            cells[str(seed)] = cell_of
        for name, changes in settings().items():
            with pieces.optional():
                made = pieces.get(
                    f"{seed}-{name.replace(' ', '_').replace(',', '')}", partial(bench.run, changes)
                )
                cell_of[name] = cell(made)
    for layers, seed in product(ELSEWHERE, SEEDS):
        bench = Bench(lazy, seed, layers)
        for name, changes in {
            "no mask": {"mask": "none"},
            "mpc at subject": {**SUBJECT, "mask": "entropy"},
        }.items():
            with pieces.optional():
                made = pieces.get(f"{seed}-{layers[0]}-{name.replace(' ', '_')}", partial(bench.run, changes))
                cells[str(seed)][f"layers {layers[0]}-{layers[-1]}, {name}"] = cell(made)
    setup = {
        "model": "smollm2-135m",
        "facts_per_seed": FACTS,
        "batch": FACTS,
        "layers": list(EDITED),
        "protocol": f"teacher_forced, after the batch; two true paraphrases, {NEIGHBOURS} neighbours",
        "method": "nmke-linear, spread targets found once per seed and choice of layers",
    }
    print(write_record("finding_quality", {"setup": setup, "missing": pieces.missing, "cells": cells}))


if __name__ == "__main__":
    main()
