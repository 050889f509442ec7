"""Does an edit cost the same after thousands of edits? Time and memory per edit of one long run, and its size on disk.

A tiny random Llama, random facts, batches of ten; every twentieth fact is a second edit of an earlier one, so
that superseding is in the measure too. Few optimisation steps, no mask, health off: what is left is what could
grow, that is the session, the ledger, the key memory and the files. A busy machine is slower at one time than
at another, so after every batch a fixed piece of work is timed too (forward passes of the same model); the
cost that is compared is the batch's CPU time in units of that work's. Plain seconds are recorded beside it.

    python benchmarks/flat_cost.py [--edits 20000]
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from nmke.config import EditConfig
from nmke.models.load import EditableModel
from nmke.session import EditSession
from nmke.stats.store import StatsStore
from nmke.types import EditRequest
from record import write_record

BATCH = 10
POINTS = (10, 100, 1000, 2000, 5000, 10_000, 20_000)
WINDOW = 19  # batches whose median stands for a point
TARGET = 1.25  # cost at edit 2000 over cost at edit 10
SETTINGS: dict[str, Any] = {
    "method": "memit-memory",
    "batch_size": BATCH,
    "steps": 2,
    "context_tokens": 2,
    "corpus_tokens": 2000,
    "covariance_weight": 10.0,
    "health_every": 0,
}
SYLLABLES = (
    "ba",
    "ko",
    "ri",
    "mu",
    "ten",
    "sal",
    "vi",
    "dor",
    "ne",
    "lu",
    "pha",
    "gri",
    "zo",
    "mar",
    "qui",
    "el",
)
ANSWERS = ("Red", "Oak", "Sun", "Tin", "Fox", "Ice", "Owl", "Elm")
RELATIONS = ("The keeper of {} is", "The colour of {} is", "The river near {} is called")


@dataclass(frozen=True)
class Cost:
    """One batch: seconds of wall clock and CPU, CPU seconds of the fixed work after it, and resident memory, bytes."""

    wall: float
    cpu: float
    fixed: float
    memory: int


def tiny_model() -> EditableModel:
    """A random Llama of two layers (width 32, 64 neurons) whose tokens are bytes."""
    torch.manual_seed(0)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        initializer_range=0.1,
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")
    return EditableModel.wrap(LlamaForCausalLM(config), fast, "tiny-random")


def random_facts(count: int, seed: int = 0) -> list[EditRequest]:
    """Facts about made-up names; every twentieth gives an earlier one another answer."""
    state = random.Random(seed)
    facts: list[EditRequest] = []
    for number in range(count):
        if number % 20 == 19:
            old = facts[state.randrange(number)]
            prompt, subject = old.prompt, old.subject
        else:
            prompt = state.choice(RELATIONS)
            subject = "".join(state.choices(SYLLABLES, k=2)).title() + f" {number}"
        facts.append(EditRequest(prompt, subject, state.choice(ANSWERS), id=f"f{number:06d}"))
    return facts


def resident() -> int:
    """Resident memory of this process, bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@torch.inference_mode()
def fixed_work(session: EditSession, ids: torch.Tensor) -> float:
    """CPU seconds of the same forward passes every time."""
    start = time.process_time()
    for _ in range(5):
        session.model.model(input_ids=ids, use_cache=False)
    return time.process_time() - start


def measure(session: EditSession, facts: list[EditRequest]) -> list[Cost]:
    """Edit everything; one cost per batch."""
    costs: list[Cost] = []
    ids = torch.arange(20 * 24).reshape(20, 24) % 250
    reports = session.edit_many(facts)
    while True:
        wall, cpu = time.perf_counter(), time.process_time()
        if next(reports, None) is None:
            return costs
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        costs.append(Cost(wall, cpu, fixed_work(session, ids), resident()))
        if len(costs) % 100 == 0:
            print(f"{len(costs) * BATCH} edits, {costs[-1].cpu / BATCH * 1000:.1f} ms CPU each", flush=True)


def at(costs: list[Cost], edit: int) -> dict[str, float]:
    """The median batch around an edit; the first batch of all, which warms up, is left out."""
    middle = edit // BATCH
    first = max(1, min(middle - WINDOW // 2, len(costs) - WINDOW))
    window = costs[first : first + WINDOW]
    return {
        "edit": edit,
        "seconds_per_edit": statistics.median(c.wall for c in window) / BATCH,
        "cpu_seconds_per_edit": statistics.median(c.cpu for c in window) / BATCH,
        "cost": statistics.median(c.cpu / c.fixed for c in window),
        "resident_mib": statistics.median(c.memory for c in window) / 2**20,
    }


def size(path: Path) -> int:
    """Bytes of a file or of everything in a folder."""
    return (
        path.stat().st_size
        if path.is_file()
        else sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
    )


def run(edits: int) -> dict[str, Any]:
    """The whole benchmark as one record."""
    with tempfile.TemporaryDirectory() as temporary:
        root, store = Path(temporary) / "run", StatsStore(Path(temporary) / "stats")
        start = time.perf_counter()
        with EditSession.open(
            tiny_model(), root, config=EditConfig.create(**SETTINGS), store=store
        ) as session:
            costs = measure(session, random_facts(edits))
            seconds = time.perf_counter() - start
            statuses = [
                place.status for seq in session.ledger.active() for place in session.ledger.edits.batch(seq)
            ]
            start = time.perf_counter()
            session.verify()
            verify = time.perf_counter() - start
        start = time.perf_counter()
        EditSession.open(tiny_model(), root, config=EditConfig.create(**SETTINGS), store=store).close()
        reopen = time.perf_counter() - start
        points = [at(costs, edit) for edit in POINTS if edit <= edits]
        files = {"ledger": size(root / "ledger.sqlite"), "run_folder": size(root)}
    ratios = {str(int(p["edit"])): round(p["cost"] / points[0]["cost"], 3) for p in points}
    return {
        "edits": edits,
        "batch_size": BATCH,
        "settings": SETTINGS,
        "statuses": {s: statuses.count(s) for s in sorted(set(statuses))},
        "window_batches": WINDOW,
        "points": points,
        "cost_over_edit_10": ratios,
        "target_at_2000": TARGET,
        "seconds": round(seconds, 1),
        "verify_seconds": round(verify, 2),
        "reopen_seconds": round(reopen, 2),
        "bytes": files,
        "bytes_per_edit": {name: round(value / edits, 1) for name, value in files.items()},
    }


def main() -> None:
    """Run it and write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--edits", type=int, default=20_000)
    given = parser.parse_args()
    torch.set_num_threads(1)
    path = write_record("flat_cost", run(given.edits))
    print(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
