"""Seconds of the target values of 48 edits, whose groups all ranks share; run by `torchrun`, printed by rank 0."""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from nmke.cli.ranks import among_ranks
from nmke.config import EditConfig
from nmke.editors.targets import optimise_targets
from nmke.models.load import load_model
from speed.models import CONTEXTS, SHAPES, random_model, requests

LAYERS = (4, 5, 6, 7, 8)
GROUP = 192  # tokens of a group: small, so that there are enough groups to share out evenly


def main() -> None:
    torch.set_num_threads(1)
    with among_ranks() as follows:
        if follows:
            return
        with tempfile.TemporaryDirectory() as folder:
            made = random_model(SHAPES["smollm2"], torch.device("cpu"), torch.float32)
            made.model.save_pretrained(folder)
            made.tokenizer.save_pretrained(folder)
            model = load_model(folder)
            config = EditConfig.create(steps=8, stop_loss=0.0, lr=0.2, layers=LAYERS, token_budget=GROUP)
            some, all_of_them = requests(24), requests(48)
            optimise_targets(model, some, CONTEXTS, LAYERS, "down_proj", config)  # the others load the model
            begun = time.perf_counter()
            optimise_targets(model, all_of_them, CONTEXTS, LAYERS, "down_proj", config)
            print(time.perf_counter() - begun)


if __name__ == "__main__":
    main()
