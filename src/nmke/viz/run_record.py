"""Everything that a run's folder says about the run, read once; no model is loaded and nothing is computed anew."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from nmke.active_edits import Status
from nmke.batch_file import read_columns
from nmke.evaluation.score_records import ScoreRecord, read_scores
from nmke.events import EditRecord, Event
from nmke.ledger import Ledger
from nmke.run_folder import RECIPE, BaseInfo, RunFolder


@dataclass(frozen=True)
class Batch:
    """One batch whose writes are in the model.

    Args:
        event: Its row in the ledger.
        first: Facts given before it.
    """

    event: Event
    first: int

    @property
    def edits(self) -> int:
        """Facts given up to its end."""
        return self.first + len(self.event.edits)

    def count(self, status: Status) -> int:
        """How many of its facts have that status."""
        return sum(record.status == status for record in self.event.edits)

    @property
    def health(self) -> dict[str, Any]:
        """What the look at the model's health found, {} when there was none."""
        return dict(self.event.body.get("health") or {})

    def per_layer(self, name: str) -> dict[int, Any]:
        """An entry of the body that is kept per layer, such as "drift"."""
        return {int(layer): value for layer, value in (self.event.body.get(name) or {}).items()}


@dataclass(frozen=True)
class NeuronUse:
    """How often the batches wrote into each neuron of a layer.

    Args:
        counts: Per neuron, in how many batches.
        batches: In how many batches the layer was written.
    """

    counts: Int[Tensor, " d_mlp"]
    batches: int


@dataclass(frozen=True)
class RunRecord:
    """A run as its folder tells it.

    Args:
        root: The folder.
        base: The model that was edited.
        created: When the run was begun, UTC.
        contexts: The prefixes that every prompt was optimised under.
        events: Everything that happened, oldest first.
        batches: The batches whose writes are in the model, oldest first.
        held: The record of every fact that the model holds now; superseded ones left out.
        scores: What `nmke edit` and `nmke eval` measured.
        recipe: The settings that were given, as YAML text; "" without.
        use: Per layer how often each neuron was written; {} where every batch wrote into all.
    """

    root: Path
    base: BaseInfo
    created: str
    contexts: tuple[str, ...]
    events: tuple[Event, ...]
    batches: tuple[Batch, ...]
    held: tuple[EditRecord, ...]
    scores: tuple[ScoreRecord, ...] = ()
    recipe: str = ""
    use: Mapping[int, NeuronUse] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.root.resolve().name

    @property
    def content_hash(self) -> str:
        """Of the edited model as it is now; of the base when nothing was ever edited."""
        if self.events:
            return self.events[-1].hash_after
        return hashlib.sha256(self.base.fingerprint.encode()).hexdigest()

    @property
    def config(self) -> dict[str, Any]:
        """Settings of the newest batch."""
        return dict(self.batches[-1].event.body.get("config", {})) if self.batches else {}

    @property
    def last_health(self) -> dict[str, Any]:
        """The newest look at the model's health, {} when there was none."""
        return next((batch.health for batch in reversed(self.batches) if batch.health), {})

    def edits_at(self, content_hash: str) -> int | None:
        """How many facts had been given when the model had that hash; None when it never had among those active."""
        if self.batches and self.batches[0].event.hash_before == content_hash:
            return 0
        return next((b.edits for b in self.batches if b.event.hash_after == content_hash), None)


def read_run(root: Path) -> RunRecord:
    """The record of a run.

    Raises:
        RequestError: If `root` is no run folder.
        LedgerError: If its record is damaged.
    """
    folder = RunFolder.open(root)
    manifest = folder.read_manifest()
    with closing(Ledger(folder.ledger)) as ledger:
        events = tuple(ledger.events())
        by_seq = {event.seq: event for event in events}
        active, holders = ledger.active(), sorted((p.seq, p.position) for p in ledger.edits.holders())
    batches, given = [], 0
    for seq in active:
        batches.append(Batch(by_seq[seq], given))
        given = batches[-1].edits
    recipe = root / RECIPE
    return RunRecord(
        root=root,
        base=folder.base,
        created=manifest["created"],
        contexts=tuple(manifest["contexts"]),
        events=events,
        batches=tuple(batches),
        held=tuple(by_seq[seq].edits[position] for seq, position in holders),
        scores=tuple(read_scores(root)),
        recipe=recipe.read_text(encoding="utf-8") if recipe.is_file() else "",
        use=_neuron_use(folder, batches),
    )


def _neuron_use(folder: RunFolder, batches: list[Batch]) -> dict[int, NeuronUse]:
    counts: dict[int, Tensor] = {}
    written: dict[int, int] = {}
    masked = [batch for batch in batches if batch.event.body.get("masks")]
    for batch in masked:
        path = folder.root / folder.edits_name(batch.event.seq)
        for layer, (index, d_mlp) in read_columns(path).items():
            counts.setdefault(layer, torch.zeros(d_mlp, dtype=torch.int64))[index] += 1
            written[layer] = written.get(layer, 0) + 1
    return {layer: NeuronUse(counts[layer], written[layer]) for layer in sorted(counts)}


def facts_jsonl(records: tuple[EditRecord, ...]) -> str:
    """The facts as a file that `nmke edit --facts` reads."""
    lines = []
    for record in records:
        request = record.request
        content: dict[str, Any] = {
            "id": request.id,
            "prompt": request.prompt,
            "subject": request.subject,
            "target_new": request.target_new,
        }
        if request.target_true is not None:
            content["target_true"] = request.target_true
        content["paraphrases"] = list(request.paraphrases)
        content["neighborhood"] = [vars(neighbor) for neighbor in request.neighborhood]
        lines.append(json.dumps(content, ensure_ascii=False))
    return "".join(f"{line}\n" for line in lines)
