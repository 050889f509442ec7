"""Gather key statistics, and statistics of MLP inputs, once per model and layer, and keep them on disk.

A cache file belongs to exactly one combination of weights, layer, corpus, token count and dtype: the key
is a hash over all of them and the file repeats them, so statistics of other weights are never used.
Gathering is streamed (one window of text at a time), stops after the last edited layer, leaves out
position 0 (the attention sink) and padding, and resumes where a killed run stopped.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from nmke.config import EditConfig
from nmke.errors import RequestError, StatsError
from nmke.models.cache import atomic_file, cache_dir
from nmke.models.load import EditableModel
from nmke.models.ranks import shared_out
from nmke.models.replay import in_rows
from nmke.models.tokens import pad_batch
from nmke.models.tracing import record_inputs, stop_after
from nmke.progress import Progress, quiet
from nmke.stats.corpus import SELF_WRITTEN, WINDOW, Corpus, openers, read_corpus, self_written
from nmke.stats.covariance import KeyCovariance
from nmke.stats.subjects import COUNT, RECIPE, ordinary_subjects, subject_windows

logger = logging.getLogger(__name__)
FORMAT = "nmke.key-covariance/1"
Kind = Literal["keys", "inputs", "subjects"]
FORMATS: dict[Kind, str] = {
    "keys": FORMAT,
    "inputs": "nmke.input-moment/2",
    "subjects": "nmke.subject-moment/2",
}
WHAT: dict[Kind, str] = {"keys": "key", "inputs": "input", "subjects": "subject"}
INPUT_KINDS: tuple[Kind, Kind] = ("inputs", "subjects")
BATCH_WINDOWS = 16
CHECKPOINT_EVERY = 32  # batches between saved partial results, at most
LEAST_STRETCHES = 8  # that the text is cut into for processes to share, where it is long enough


@dataclass(frozen=True)
class StatsKey:
    """Everything that statistics depend on; the format tells their kinds apart."""

    weights: str
    layer: int
    corpus: str
    tokens: int
    dtype: str
    format: str = FORMAT

    @property
    def digest(self) -> str:
        """Hash that names the cache file."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:24]


@dataclass(frozen=True)
class CorpusSpec:
    """Which text to use: `source` is "self", a file, or "hf:NAME"; `tokens` how many tokens of it."""

    source: str = SELF_WRITTEN
    tokens: int = 30_000
    seed: int = 0

    @classmethod
    def of(cls, config: EditConfig) -> CorpusSpec:
        """The text that the settings ask for."""
        return cls(config.corpus, config.corpus_tokens, config.seed)

    @property
    def label(self) -> str:
        """What identifies the text itself: its content for a file, its recipe when the model writes it."""
        if self.source == SELF_WRITTEN:
            recipe = hashlib.sha256("\n".join(openers()).encode()).hexdigest()[:12]
            return f"{self.source}:{self.seed}:{recipe}"
        if not Path(self.source).is_file():
            return f"{self.source}:{self.seed}"
        return hashlib.sha256(Path(self.source).read_bytes()).hexdigest()


class StatsStore:
    """The on-disk cache of key statistics.

    Args:
        root: Folder; defaults to `stats/` in the cache.
    """

    def __init__(self, root: Path | None = None) -> None:
        self.root = root or cache_dir() / "stats"
        self._unsaved: dict[StatsKey, KeyCovariance] = {}  # what the disk would not take

    def path(self, key: StatsKey) -> Path:
        """Where the statistics of `key` stand or would stand."""
        return self.root / f"{key.digest}.safetensors"

    def load(self, key: StatsKey) -> KeyCovariance | None:
        """The cached statistics, or None.

        Raises:
            StatsError: If the file is damaged or belongs to something else.
        """
        return self._unsaved.get(key) or _load(self.path(key), key)

    def save(self, key: StatsKey, covariance: KeyCovariance) -> None:
        """Write the statistics whole or not at all; where the disk refuses, they last as long as this store."""
        try:
            _save(self.path(key), covariance, {**asdict(key), "count": covariance.count})
        except (OSError, SafetensorError) as error:
            self._unsaved[key] = covariance
            logger.warning(
                "key statistics of layer %d cannot be kept in %s (%s): they are gathered again next time; "
                "set NMKE_CACHE to a folder that can be written",
                key.layer,
                self.root,
                error,
            )

    def keys_for(
        self, model: EditableModel, layers: Sequence[int], spec: CorpusSpec, kind: Kind = "keys"
    ) -> dict[int, StatsKey]:
        """The cache key of each layer."""
        dtype, name = str(model.dtype).removeprefix("torch."), FORMATS[kind]
        text, amount = (RECIPE, COUNT) if kind == "subjects" else (spec.label, spec.tokens)
        return {i: StatsKey(model.fingerprint, i, text, amount, dtype, name) for i in layers}

    def missing(
        self, model: EditableModel, layers: Sequence[int], spec: CorpusSpec, kind: Kind = "keys"
    ) -> list[int]:
        """The layers that have no statistics yet."""
        keys = self.keys_for(model, layers, spec, kind)
        return [i for i, key in keys.items() if key not in self._unsaved and not self.path(key).exists()]

    def prepare(
        self,
        model: EditableModel,
        layers: Sequence[int],
        spec: CorpusSpec,
        progress: Progress = quiet,
        kind: Kind = "keys",
    ) -> dict[int, KeyCovariance]:
        """Statistics of every layer, gathered when missing.

        Args:
            model: The unedited model.
            layers: Which layers.
            spec: Which text.
            progress: Told how far it is.
            kind: The second moment of keys; of MLP inputs with a one below each, [d_model + 1, d_model + 1]; or of
                the latter in sentences that lead up to invented names, whatever the text (`nmke.stats.subjects`).

        Returns:
            One `KeyCovariance` per layer.

        Raises:
            StatsError: If a cache file is damaged.
            RequestError: If the corpus cannot be read or is too short.
            LayoutError: If inputs are asked for and the model does not show what its neurons read.
        """
        keys = self.keys_for(model, layers, spec, kind)
        missing = self.missing(model, layers, spec, kind)
        if missing:
            windows = self._windows(model, spec, kind, progress)
            self._gather(model, {i: keys[i] for i in missing}, windows, progress, kind)
        found = {i: self.load(key) for i, key in keys.items()}
        return {i: covariance for i, covariance in found.items() if covariance is not None}

    def corpus(self, model: EditableModel, spec: CorpusSpec, progress: Progress = quiet) -> Corpus:
        """The text of `spec`; what the model wrote is kept in the cache."""
        if spec.source != SELF_WRITTEN:
            return read_corpus(spec.source, limit_characters=spec.tokens * 8)
        path = self._written_text(model, spec)
        if path.exists():
            return Corpus(
                f"{SELF_WRITTEN}:{spec.tokens}:{spec.seed}", tuple(json.loads(path.read_text("utf-8")))
            )
        corpus = self_written(model, spec.tokens, spec.seed, progress)
        with (
            suppress(OSError),
            atomic_file(path) as temporary,
        ):  # a cache that cannot be written is said once, later
            temporary.write_text(json.dumps(corpus.texts), "utf-8")
        return corpus

    def _windows(
        self, model: EditableModel, spec: CorpusSpec, kind: Kind, progress: Progress
    ) -> list[list[int]]:
        if kind == "subjects":
            return subject_windows(model, ordinary_subjects())
        corpus = self.corpus(model, spec, progress)
        windows = token_windows(model, corpus, spec.tokens)
        if not windows:
            raise RequestError(
                f"corpus {corpus.name!r} holds no two tokens in a row, or {spec.tokens} tokens are too few; "
                "give more text"
            )
        return windows

    def must_write_text(self, model: EditableModel, spec: CorpusSpec) -> bool:
        """Whether the model has still to write the text of `spec`."""
        return spec.source == SELF_WRITTEN and not self._written_text(model, spec).exists()

    def _written_text(self, model: EditableModel, spec: CorpusSpec) -> Path:
        about = f"{model.fingerprint}:{model.dtype}:{spec.tokens}:{spec.label}"
        return self.root / f"corpus-{hashlib.sha256(about.encode()).hexdigest()[:24]}.json"

    def _gather(
        self,
        model: EditableModel,
        keys: dict[int, StatsKey],
        windows: Sequence[Sequence[int]],
        progress: Progress,
        kind: Kind,
    ) -> None:
        partials = {i: self.root / f"{key.digest}.partial.safetensors" for i, key in keys.items()}
        totals, start = self._resume(model, keys, partials, kind)
        stretches = _stretches(len(windows))
        todo = [(end, windows[begin:end]) for begin, end in stretches if begin >= start]
        left = sum(len(stretch) for _, stretch in todo)
        with progress.task(f"{WHAT[kind]} statistics of layers {_span(list(keys))}", total=left) as task:
            for (end, stretch), sums in zip(
                todo, shared_out(model, _gather_stretches, todo, tuple(keys), kind), strict=True
            ):
                totals = {i: totals[i].merge(part) for i, part in sums.items()}
                task.advance(len(stretch))
                if end < len(windows):
                    for i, key in keys.items():
                        with suppress(OSError, SafetensorError):  # said when all is gathered
                            _save(
                                partials[i], totals[i], {**asdict(key), "count": totals[i].count, "next": end}
                            )
        for i, key in keys.items():
            self.save(key, totals[i])
            with suppress(OSError):
                partials[i].unlink(missing_ok=True)

    def _resume(
        self, model: EditableModel, keys: dict[int, StatsKey], partials: dict[int, Path], kind: Kind
    ) -> tuple[dict[int, KeyCovariance], int]:
        found = {i: _load(partials[i], key) for i, key in keys.items() if partials[i].exists()}
        nexts = {_metadata(partials[i]).get("next", "0") for i in found}
        if len(found) == len(keys) and len(nexts) == 1:
            logger.info("resuming key statistics at window %s", next(iter(nexts)))
            return {i: c for i, c in found.items() if c is not None}, int(next(iter(nexts)))
        return _nothing(model, list(keys), kind), 0


def _stretches(n_windows: int) -> list[tuple[int, int]]:
    """Runs of windows that are summed on their own: at least `LEAST_STRETCHES` if there are as many batches.

    They depend on the text alone, so that the sums are the same bits however many processes make them.
    """
    batches = -(-n_windows // BATCH_WINDOWS)
    size = BATCH_WINDOWS * max(1, min(CHECKPOINT_EVERY, batches // LEAST_STRETCHES))
    return [(begin, min(begin + size, n_windows)) for begin in range(0, n_windows, size)]


def _gather_stretches(
    model: EditableModel,
    stretches: Sequence[tuple[int, Sequence[Sequence[int]]]],
    layers: Sequence[int],
    kind: Kind,
) -> Iterator[dict[int, KeyCovariance]]:
    """The sums of one stretch after another, in host memory."""
    for _, windows in stretches:
        sums = _nothing(model, layers, kind)
        for begin in range(0, len(windows), BATCH_WINDOWS):
            add_windows(model, sums, windows[begin : begin + BATCH_WINDOWS], kind)
        yield {i: KeyCovariance(found.total.cpu(), found.count) for i, found in sums.items()}


def _nothing(model: EditableModel, layers: Sequence[int], kind: Kind) -> dict[int, KeyCovariance]:
    layout = model.layout
    size = {i: layout.layers[i].d_mlp if kind == "keys" else layout.d_model + 1 for i in layers}
    return {i: KeyCovariance.empty(size[i], model.device) for i in layers}


def token_windows(model: EditableModel, corpus: Corpus, tokens: int) -> list[list[int]]:
    """The corpus cut into windows of at most `WINDOW` tokens, `tokens` in all; each begins as the model expects."""
    windows: list[list[int]] = []
    left = tokens
    start = model.encoder.prefix_ids
    for text in corpus.texts:
        ids = model.encoder.encode(text)[len(start) :]
        for begin in range(0, len(ids), WINDOW):
            window = ids[begin : begin + min(WINDOW, left)]
            if len(window) < 2:
                continue
            windows.append([*start, *window])
            left -= len(window)
            if left < 2:
                return windows
    return windows


def add_windows(
    model: EditableModel,
    totals: dict[int, KeyCovariance],
    windows: Sequence[Sequence[int]],
    kind: Kind = "keys",
) -> None:
    """Add what is seen at every token of the windows, except padding, to each layer's total.

    Position 0 is an attention sink: its keys are unlike all others and no part of the keys' moment. A neuron's reading
    has to hold there too, so the moments of inputs have it.
    """
    batch = pad_batch([list(w) for w in windows], model.encoder.pad_id, device=model.device)
    layers = model.layout.layers
    keys = kind == "keys"
    modules = {i: layers[i].down_proj if keys else layers[i].read_in.behind_activation for i in totals}
    last = layers[max(totals)].block
    with torch.no_grad(), record_inputs(modules) as seen, stop_after(last):
        model.model(**model.inputs(batch))
    real = batch.attention_mask > 0
    if keys:
        real &= batch.position_ids > 0
    for i, covariance in totals.items():
        found = in_rows(seen[i], len(real))[real]
        covariance.add(found if keys else torch.cat([found, torch.ones_like(found[:, :1])], dim=1))


def _span(layers: list[int]) -> str:
    whole = layers == list(range(layers[0], layers[-1] + 1))
    return f"{layers[0]}-{layers[-1]}" if whole and len(layers) > 1 else ", ".join(map(str, layers))


def _save(path: Path, covariance: KeyCovariance, metadata: dict[str, object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary:
        tensors = {"total": covariance.total.cpu().contiguous()}
        save_file(tensors, temporary, metadata={k: str(v) for k, v in metadata.items()})


def _metadata(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata() or {})


def _load(path: Path, key: StatsKey) -> KeyCovariance | None:
    if not path.exists():
        return None
    try:
        metadata = _metadata(path)
        with safe_open(path, framework="pt") as file:
            total = file.get_tensor("total")
    except (SafetensorError, OSError) as error:
        raise StatsError(
            f"statistics file {path.name} is damaged ({error}); delete it and prepare again"
        ) from error
    other = {k: metadata.get(k) for k, v in asdict(key).items() if metadata.get(k) != str(v)}
    if other:
        raise StatsError(f"statistics file {path.name} belongs to something else ({other}); delete it")
    return KeyCovariance(total, int(metadata["count"]))
