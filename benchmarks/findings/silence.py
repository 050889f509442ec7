"""Does the model lose more without its general neurons than without specific or random ones?

The claim (NMKE, arXiv:2510.22139): silencing the top-k knowledge-general neurons costs far more accuracy than
silencing specific or random ones. Neurons are ranked over all layers by the paper's score (log-probability
increase at the last token) on 100 CounterFact facts of the seed; k = 10 and 50 of 46,080. Asked afterwards: 200
of the 1,516 MMLU questions (zero-shot, the likeliest of the letters A to D; the same 200 for both seeds, none
over 120 tokens), 300 known true facts (first token of the answer) and perplexity on 1,500 tokens of WikiText-2; the
model runs in bfloat16.
This model answers MMLU near chance, so that accuracy there has little to lose: the mean log-probability of the
right letter, the known facts and the perplexity are read beside it. Losses are paired by question.

    python benchmarks/findings/silence.py
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial

import torch
from common import SEEDS, Json, Lazy, Pieces, estimate, need, surveyed

from nmke.evaluation.metrics import paired_difference
from nmke.evaluation.perplexity import text_windows
from nmke.evaluation.target_scores import score_rows
from nmke.models.load import EditableModel
from nmke.models.tokens import length_buckets, pad_batch
from nmke.neurons.depth import by_layer_counts, top_general, top_specific
from nmke.neurons.silence import silenced
from nmke.types import Mask, Scores
from record import write_record

SIZES = (10, 50)
KINDS = ("general", "specific", "random")
FACTS, QUESTIONS, KNOWN, TOKENS = 100, 200, 300, 1500
LONGEST = 120  # tokens of a question
LETTERS = ["A", "B", "C", "D"]


def questions() -> list[tuple[str, int]]:
    """MMLU questions as prompts, each with the index of its right letter."""
    records = [json.loads(line) for line in need("bench_mmlu.jsonl").open(encoding="utf-8")]
    random.Random(0).shuffle(records)
    return [(_prompt(record), int(record["answer"])) for record in records]


def _prompt(record: Json) -> str:
    choices = "\n".join(f"{letter}. {text}" for letter, text in zip(LETTERS, record["choices"], strict=True))
    return f"Question: {record['question']}\n{choices}\nAnswer:"


def known_facts() -> list[tuple[str, str]]:
    """True facts: prompt and answer."""
    records = [json.loads(line) for line in need("known_1000.jsonl").open(encoding="utf-8")]
    random.Random(0).shuffle(records)
    return [(record["prompt"], record["attribute"]) for record in records[:KNOWN]]


@torch.inference_mode()
def last_log_probs(model: EditableModel, prompts: list[list[int]]) -> torch.Tensor:
    """Log-probabilities of the next token, [prompts, d_vocab]."""
    found = torch.empty(len(prompts), model.layout.d_vocab)
    for bucket in length_buckets([len(ids) for ids in prompts], 1024):
        batch = pad_batch([prompts[i] for i in bucket], model.encoder.pad_id, "left")
        logits = model.model(**model.inputs(batch), logits_to_keep=1).logits[:, -1]
        found[bucket] = torch.log_softmax(logits.float(), dim=1)
    return found


def ask(model: EditableModel) -> Json:
    """Scores of the model as it is, one value per question."""
    asked = [(model.encoder.encode(text), answer) for text, answer in questions()]
    asked = [(ids, answer) for ids, answer in asked if len(ids) <= LONGEST][:QUESTIONS]
    letters = [model.encoder.encode_target("Answer:", letter)[0] for letter in LETTERS]
    said = torch.log_softmax(last_log_probs(model, [ids for ids, _ in asked])[:, letters], dim=1)
    answers = torch.tensor([answer for _, answer in asked])
    known = known_facts()
    words = last_log_probs(model, [model.encoder.encode(prompt) for prompt, _ in known])
    first = torch.tensor([model.encoder.encode_target(prompt, answer)[0] for prompt, answer in known])
    text = [json.loads(line)["text"] for line in need("text_wikitext2_test.jsonl").open(encoding="utf-8")]
    rows = text_windows(model, text, 256, TOKENS)
    losses = [-sum(score.log_probs) / len(score.log_probs) for score in score_rows(model, rows)]
    return {
        "mmlu": (said.argmax(dim=1) == answers).double().tolist(),
        "mmlu_log_prob": said.gather(1, answers[:, None])[:, 0].double().tolist(),
        "known": (words.argmax(dim=1) == first).double().tolist(),
        "known_log_prob": words.gather(1, first[:, None])[:, 0].double().tolist(),
        "text_log_prob": [-loss for loss in losses],
    }


def chosen(scores: Mapping[int, Scores], kind: str, count: int, seed: int) -> dict[int, Mask]:
    """The neurons to silence."""
    if kind == "general":
        return top_general(scores, count)
    if kind == "specific":
        return top_specific(scores, count)
    sizes = [layer.shape[1] for layer in scores.values()]
    generator = torch.Generator().manual_seed(1000 * seed + count + sum(map(ord, kind)))
    keep = torch.zeros(sum(sizes), dtype=torch.bool)
    keep[torch.randperm(sum(sizes), generator=generator)[:count]] = True
    return dict(zip(scores, keep.split(sizes), strict=True))


def silent(lazy: Lazy, seed: int, size: int, kind: str) -> Json:
    """Scores of the model without some neurons."""
    neurons = chosen(surveyed(Lazy(), seed, FACTS, "last", "lps"), kind, size, seed)
    with silenced(lazy.model, neurons):
        return ask(lazy.model) | {"per_layer": [int(mask.sum()) for mask in neurons.values()]}


def main() -> None:
    """Measure and write the record."""
    pieces, lazy = Pieces("silence"), Lazy("bfloat16")
    base = pieces.get("base", lambda: ask(lazy.model))
    cells: Json = {}
    for seed, size in itertools.product(SEEDS, SIZES):
        cell: Json = {}
        for kind in KINDS:
            make = partial(silent, lazy, seed, size, kind)
            with pieces.optional():
                cell[kind] = compared(pieces.get(f"{size}-{seed}-{kind}", make), base)
        if not cell:
            continue
        scores = surveyed(Lazy(), seed, FACTS, "last", "lps")
        cells.setdefault(str(size), {})[str(seed)] = cell
        cell["in_both_sets"] = sum(by_layer_counts(top_general(scores, size), top_specific(scores, size)))
    setup = {
        "model": "smollm2-135m, bfloat16",
        "ranked_on": f"{FACTS} CounterFact facts per seed, lps at the last token",
        "mmlu": f"{QUESTIONS} of 1516 questions, zero-shot, none over {LONGEST} tokens",
        "known": f"{KNOWN} of 1209 known facts, first token of the answer",
        "text": f"about {TOKENS} tokens of WikiText-2 test",
    }
    unsilenced = {name: estimate(values) for name, values in base.items() if isinstance(values, list)}
    about = {"setup": setup, "missing": pieces.missing}
    print(write_record("finding_silence", {**about, "unsilenced": unsilenced, "cells": cells}))


def compared(found: Json, base: Json) -> Json:
    """Means with intervals, and the paired loss against the model as it is."""
    measures = {
        name: {"after": estimate(values), "lost": asdict(paired_difference(base[name], values))}
        for name, values in found.items()
        if name in base and isinstance(values, list)
    }
    return {"per_layer": found["per_layer"], "measures": measures}


if __name__ == "__main__":
    main()
