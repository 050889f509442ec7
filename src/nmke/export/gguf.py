"""Export as GGUF for llama.cpp: the base's own file with the edited MLP matrices replaced by plain floats.

Every other tensor stays quantised as it was and every key of the metadata keeps its bytes, so nothing but the
edits changes. Only a base that came from a GGUF file (or is built in, which is the same) has one to patch.
GGUF keeps `blk.N.ffn_down.weight` as [d_model, d_mlp], `ffn_gate` and `ffn_up` as [d_mlp, d_model], row by row and
without permutation, the only matrix that an MLP without a gate reads through as `ffn_up`; that this is so for the
file at hand is checked by comparing it with the loaded base before anything is written.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from nmke.errors import ExportError, NumericsError
from nmke.export.base import (
    Answers,
    ExportReport,
    check_exportable,
    check_prompts,
    exporters,
    folder_bytes,
    last_logits,
    new_folder,
)
from nmke.export.card import write_card
from nmke.export.changes import Change, changes, logits_apart
from nmke.export.gguf_file import dequantised, differing, open_gguf, write_patched
from nmke.models.builtin import BUILTIN_MODELS, join_wheels
from nmke.models.load import EditableModel, load_model
from nmke.session import EditSession

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGUFReader

FloatType = Literal["F32", "F16"]
_TYPES = {"F32": torch.float32, "F16": torch.float16}
TOLERANCE = {"F32": 1e-4, "F16": 5e-2}


def export_gguf(
    session: EditSession, path: Path, *, force: bool = False, edited_type: FloatType = "F32"
) -> ExportReport:
    """Write the patched GGUF, load it back and compare every weight and the logits with the session's.

    Weights must be equal bit for bit, for F16 after rounding the edited ones to float16; logits may differ by
    1e-4 with F32 and by 0.05 with F16.

    Args:
        session: The run to export; its model is not changed.
        path: Folder to make, with one `.gguf` file and a model card.
        force: Replace an earlier export that stands there.
        edited_type: How edited tensors are stored; F16 halves their size.

    Raises:
        ExportError: If the base has no GGUF file, the file is not the base's, it cannot be written, or what was
            written is not the session's model.
        NumericsError: If a weight is not finite, also in float16 when that is asked for.
    """
    check_exportable(session)
    prompts = check_prompts(session)
    changed = changes(session)
    name = f"{session.model.name}-edited.gguf"
    with _original(session.model) as original, new_folder(path, force=force) as building:
        reader = open_gguf(original)
        replaced = {k: v for c in changed for k, v in _converted(c, edited_type).items()}
        for change in changed:
            _check_base(reader, change, original)
        write_patched(reader, building / name, replaced)
        others = sorted(set(differing(reader, open_gguf(building / name))) - set(replaced))
        if others:
            raise ExportError(f"the copy differs in {others[0]!r}; nothing was exported: try another disk")
        write_card(session, building, "gguf", load=_load_line(f"{path.name}/{name}"))
        worst, scored = _compare(session, building / name, prompts, changed, edited_type)
    size = sum(array.nbytes for array in replaced.values()) / 1e6
    note = f"{len(changed)} edited tensors as {edited_type}, {size:.1f} MB of the file; all else bit for bit"
    return ExportReport(
        "gguf",
        path,
        folder_bytes(path),
        session.content_hash,
        worst,
        TOLERANCE[edited_type],
        len(prompts),
        _load_line(str(path / name)),
        (note if changed else "nothing is changed: a copy of the base's file", *scored),
    )


@contextmanager
def _original(model: EditableModel) -> Iterator[Path]:
    """The base's GGUF file; a built-in model's is fetched again, since only its converted form is kept."""
    if model.path is not None and model.path.is_file():
        yield model.path
        return
    if model.source not in BUILTIN_MODELS:
        raise ExportError(
            f"base {model.source!r} did not come from a GGUF file, so there is none to patch; export with `--to hf` "
            "and convert that folder with llama.cpp's `convert_hf_to_gguf.py FOLDER --outtype f16`"
        )
    with tempfile.TemporaryDirectory(prefix="nmke-gguf-") as scratch:
        file = Path(scratch) / f"{model.source}.gguf"
        join_wheels(BUILTIN_MODELS[model.source], Path(scratch), file)
        yield file


def _tensors(change: Change, matrix: Tensor) -> dict[str, Tensor]:
    """A changed matrix as the file's tensors, by their names."""
    prefix = f"blk.{change.place.layer}.ffn_{change.place.part}"
    if not change.reads:
        return {f"{prefix}.weight": matrix}
    if not change.with_bias:
        return {f"{prefix}.weight": matrix.T}
    return {f"{prefix}.weight": matrix[:-1].T, f"{prefix}.bias": matrix[-1]}


def _converted(change: Change, edited_type: FloatType) -> dict[str, np.ndarray[Any, Any]]:
    matrix = change.edited.to(_TYPES[edited_type])
    if not bool(torch.isfinite(matrix).all()):
        raise NumericsError(f"{change.name!r} does not fit into {edited_type}; export it as F32")
    return {name: t.cpu().contiguous().numpy() for name, t in _tensors(change, matrix).items()}


def _check_base(reader: GGUFReader, change: Change, file: Path) -> None:
    """Refuse a file whose tensors are not the loaded base's."""
    for name, base in _tensors(change, change.base).items():
        found = dequantised(reader, name)
        loaded = None if found is None else torch.from_numpy(found.copy()).to(base.dtype)
        if loaded is None or not torch.equal(loaded, base.cpu()):
            what = "has no" if found is None else "has another"
            raise ExportError(
                f"GGUF file {str(file)!r} {what} {name!r} than the loaded base in {change.name!r}; "
                "put the file back that the run was begun on, or export with `--to hf`"
            )


def _compare(
    session: EditSession,
    file: Path,
    prompts: Sequence[str],
    changed: Sequence[Change],
    edited_type: FloatType,
) -> tuple[float, tuple[str, ...]]:
    """Load the file as any other model; the largest difference of logits, and what scoring it again gave.

    Raises:
        ExportError: If a weight, a token id or the logits are not the session's.
    """
    reloaded = load_model(str(file), dtype=session.folder.base.dtype, device=str(session.model.device))
    edited = {change.name for change in changed} | {f"{c.module}.bias" for c in changed if c.with_bias}
    found = reloaded.model.state_dict()
    for name, tensor in session.model.model.state_dict().items():
        wanted = tensor.to(_TYPES[edited_type]).to(tensor.dtype) if name in edited else tensor
        if name not in found or not torch.equal(wanted, found[name]):
            raise ExportError(f"loaded back, {name!r} is not the session's; nothing was exported")
    for prompt in prompts:
        if reloaded.encoder.encode(prompt) != session.model.encoder.encode(prompt):
            raise ExportError(
                f"loaded back, the tokenizer reads {prompt[:80]!r} otherwise; nothing was exported"
            )
    worst = logits_apart(last_logits(reloaded, prompts), last_logits(session.model, prompts))
    if not worst <= TOLERANCE[edited_type]:
        raise ExportError(
            f"the GGUF file gives logits that differ by {worst:.2g} (at most {TOLERANCE[edited_type]:g} allowed); "
            "nothing was exported: store edited tensors as F32"
        )
    return worst, Answers.by(session).rescored(reloaded)


def _load_line(file: str) -> str:
    return f"llama-server -m {file}   or   nmke.load_model({file!r})"


exporters.register(
    "gguf",
    export_gguf,
    source="gguf",
    summary="the base's GGUF file with the edited tensors replaced, for llama.cpp",
)
