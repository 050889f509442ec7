"""Export as a delta: the changed columns and nothing else, to be applied to the base anywhere, bit for bit.

One safetensors file. Per changed tensor NAME, with `touched` of its d_mlp columns changed:
    NAME.columns  int32 [touched]             which columns, ascending
    NAME.values   [d_model, touched]          their content, in the model's own type
A column belongs to a neuron. NAME is the weight of a down-projection, or of a linear layer that neurons read through:
there a column is the neuron's row of the weight, its bias, if it has one, below it ([d_model + 1, touched]).
Metadata, all strings: schema "nmke.delta/1"; base_fingerprint, base_source, base_dtype: the weights it goes on;
base_sha256: JSON, per tensor the hash of the unedited matrix; content_hash: of the model afterwards.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nmke.damage import load_json
from nmke.errors import ExportError
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
from nmke.models.load import EditableModel, load_model
from nmke.session import EditSession
from nmke.types import Columns, MatrixPlace
from nmke.weights_state import WeightsState

FILE = "delta.safetensors"
SCHEMA = "nmke.delta/1"
TOLERANCE = 1e-6  # the weights are equal bit for bit; this leaves room for kernels that are not deterministic
_KEYS = ("base_fingerprint", "base_source", "base_dtype", "base_sha256", "content_hash")


@dataclass(frozen=True)
class Delta:
    """A delta file as read.

    Args:
        path: The file.
        base_fingerprint: Hash of the weights it goes on.
        base_source: Where the one who made it had them from.
        base_dtype: Type in which the base is loaded, such as "float32".
        base_sha256: Hash of each unedited matrix, by tensor name.
        content_hash: Of the model with the delta applied.
        columns: What to write, by tensor name.
    """

    path: Path
    base_fingerprint: str
    base_source: str
    base_dtype: str
    base_sha256: Mapping[str, str]
    content_hash: str
    columns: Mapping[str, Columns]


def export_delta(session: EditSession, path: Path, *, force: bool = False) -> ExportReport:
    """Write the changed columns, read them back, apply them to the base and compare.

    The content hash must be the session's and logits may differ by 1e-6 at most. A run without changes gives
    an empty delta. While checking, the session's own model serves as the base, so no second copy is needed.

    Args:
        session: The run to export; its model is afterwards as before.
        path: Folder to make, with `delta.safetensors` and a model card.
        force: Replace an earlier export that stands there.

    Raises:
        ExportError: If it cannot be written, or does not lead to the session's model.
        NumericsError: If a weight is not finite.
    """
    check_exportable(session)
    prompts = check_prompts(session)
    expected, answers = last_logits(session.model, prompts), Answers.by(session)
    changed = changes(session)
    base = session.folder.base
    with new_folder(path, force=force) as building:
        save_file(_tensors(changed), building / FILE, metadata=_metadata(session, changed))
        write_card(session, building, "delta", load=_load_line(path.name, base.source))
        with session.base():
            _write(read_delta(building), session.model)
            worst = logits_apart(last_logits(session.model, prompts), expected)
            scored = answers.rescored(session.model)
        if not worst <= TOLERANCE:
            raise ExportError(
                f"the delta gives logits that differ by {worst:.2g} (at most {TOLERANCE:g} allowed); nothing was "
                "exported: run `nmke verify`, then try again"
            )
    touched = sum(len(c.columns) for c in changed)
    note = f"{touched} columns of {len(changed)} tensors" if changed else "nothing is changed: an empty delta"
    return ExportReport(
        "delta",
        path,
        folder_bytes(path),
        session.content_hash,
        worst,
        TOLERANCE,
        len(prompts),
        _load_line(str(path), base.source),
        (note, *scored),
    )


def read_delta(path: Path) -> Delta:
    """A delta, from its folder or from the file itself; whether it fits a base is checked when it is applied.

    Raises:
        ExportError: If it is missing, damaged, or of another schema.
    """
    file = path / FILE if path.is_dir() else path
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - no mapping
        if metadata.get("schema") != SCHEMA:
            found = metadata.get("schema")
            raise ExportError(
                f"{str(file)!r} has schema {found!r}, expected {SCHEMA!r}; give what `nmke export --to delta` wrote"
            )
        fingerprint, source, dtype, hashes, content_hash = (metadata[key] for key in _KEYS)
        base_sha256 = dict(load_json(hashes))
        columns = {
            name: Columns(tensors.pop(f"{name}.columns"), tensors.pop(f"{name}.values"))
            for name in base_sha256
        }
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise ExportError(
            f"delta {str(file)!r} is missing or damaged ({error}); export or copy it again"
        ) from error
    if tensors:
        raise ExportError(
            f"delta {str(file)!r} holds {next(iter(tensors))!r}, which it does not list; export or copy it again"
        )
    return Delta(file, fingerprint, source, dtype, base_sha256, content_hash, columns)


def apply_delta(
    delta_path: str | Path,
    base: str | Path | EditableModel,
    *,
    device: str = "auto",
    revision: str | None = None,
) -> EditableModel:
    """The edited model, bit for bit: the delta written over its base in memory.

    Args:
        delta_path: Folder or file that `export_delta` wrote.
        base: Built-in name, folder, GGUF file or hub id, loaded in the type the delta was made in; or a model
            already loaded, which is changed and must not belong to an open session.
        device: Where a base is loaded that is not yet.
        revision: Its branch, tag or commit on the hub.

    Returns:
        The loaded base, or `base` itself, with the edits in its weights.

    Raises:
        ExportError: If the delta is damaged or was made for other weights; the model is then unchanged.
    """
    delta = read_delta(Path(delta_path))
    if isinstance(base, EditableModel):
        model = base
        _forget_history(model)  # it may have been edited since it was loaded
    else:
        model = load_model(str(base), dtype=delta.base_dtype, device=device, revision=revision)
    if model.fingerprint != delta.base_fingerprint:
        dtype = str(model.dtype).removeprefix("torch.")
        raise ExportError(
            f"delta {str(delta.path)!r} goes on weights {delta.base_fingerprint[:12]} ({delta.base_source}, "
            f"{delta.base_dtype}), {model.source!r} has {model.fingerprint[:12]} ({dtype}); give that base, unedited"
        )
    _write(delta, model)
    _forget_history(model)  # a session begun on it takes it as it is now
    return model


def _write(delta: Delta, model: EditableModel) -> None:
    """Write the columns into the base's weights, all or none.

    Raises:
        ExportError: If they do not fit or do not lead to the recorded content hash.
    """
    state = WeightsState(model)
    columns: dict[MatrixPlace, Columns] = {}
    for name, saved in delta.columns.items():
        place = state.place_of(name)
        if place is None:
            raise ExportError(
                _damaged(delta, f"{name!r} is no MLP matrix of {model.source!r} that edits write")
            )
        columns[place] = saved
        matrix = state.matrix(place).read()
        if _sha256(matrix) != delta.base_sha256[name]:
            raise ExportError(
                _damaged(delta, f"{name!r} of {model.source!r} is not the matrix it was made on")
            )
        index, values = saved.index, saved.values
        shape = (matrix.shape[0], len(index))
        if (
            values.dtype != matrix.dtype
            or tuple(values.shape) != shape
            or not _within(index, matrix.shape[1])
        ):
            raise ExportError(_damaged(delta, f"the columns of {name!r} do not fit {list(matrix.shape)}"))
    before = {
        place: Columns(saved.index, state.matrix(place).columns(saved.index.long()))
        for place, saved in columns.items()
    }
    state.restore(columns)
    found = state.content_hash()
    if found != delta.content_hash:
        state.restore(before)
        raise ExportError(
            _damaged(delta, f"it leads to content hash {found[:12]}, not {delta.content_hash[:12]}")
        )


def _damaged(delta: Delta, what: str) -> str:
    return f"delta {str(delta.path)!r} cannot be applied: {what}; the model is unchanged: export or copy it again"


def _within(index: Tensor, d_mlp: int) -> bool:
    """Whether these are ascending column numbers."""
    if index.dtype != torch.int32 or index.ndim != 1 or len(index) == 0:
        return False
    return bool(index[0] >= 0 and index[-1] < d_mlp and (index[1:] > index[:-1]).all())


def _metadata(session: EditSession, changed: Sequence[Change]) -> dict[str, str]:
    base = session.folder.base
    return {
        "schema": SCHEMA,
        "base_fingerprint": base.fingerprint,
        "base_source": base.source,
        "base_dtype": base.dtype,
        "base_sha256": json.dumps({change.name: _sha256(change.base) for change in changed}),
        "content_hash": session.content_hash,
    }


def _tensors(changed: Sequence[Change]) -> dict[str, Tensor]:
    found = {}
    for change in changed:
        index = change.columns
        found[f"{change.name}.columns"] = index.to(torch.int32).cpu()
        found[f"{change.name}.values"] = change.edited[:, index].cpu().contiguous()
    return found


def _sha256(matrix: Tensor) -> str:
    """Hash of a matrix's type, shape and bytes, [rows, d_mlp] row by row."""
    digest = hashlib.sha256(f"{matrix.dtype}|{tuple(matrix.shape)}|".encode())
    digest.update(matrix.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _forget_history(model: EditableModel) -> None:
    """Take the weights as they are for the unedited ones: fingerprint and base matrices are found anew."""
    model.__dict__.pop("fingerprint", None)
    model.unedited.clear()


def _load_line(path: str, base: str) -> str:
    return f"nmke apply {path} {base} -o OUT   or   nmke.export.delta.apply_delta({path!r}, {base!r})"


exporters.register(
    "delta",
    export_delta,
    source="safetensors",
    summary="changed columns only, applied to the base anywhere with `nmke apply`",
)
