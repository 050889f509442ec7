"""A delta and its base made into one model folder, checked against the hash that the delta promises."""

from __future__ import annotations

from pathlib import Path

import nmke
from nmke.batch_file import file_sha256
from nmke.errors import ExportError
from nmke.export.base import CHECK_PROMPTS, ExportReport, folder_bytes, largest_difference, new_folder
from nmke.export.card import LOAD_HEADING, MANIFEST
from nmke.export.delta import SCHEMA, TOLERANCE, apply_delta, read_delta
from nmke.export.hf import load_line, write_model
from nmke.models.cache import weights_fingerprint
from nmke.models.load import EditableModel, load_model
from nmke.run_folder import RunFolder
from nmke.session import versions


def apply_to_folder(
    delta_path: Path,
    base: str,
    path: Path,
    *,
    force: bool = False,
    device: str = "auto",
    revision: str | None = None,
) -> ExportReport:
    """Write base and delta as a Hugging Face folder, load it back and compare every weight.

    Args:
        delta_path: Folder or file that `nmke export --to delta` wrote.
        base: Built-in name, folder, GGUF file or hub id.
        path: Folder to make.
        force: Replace an earlier export that stands there.
        device: Where the base is loaded.
        revision: Branch, tag or commit of a base on the hub.

    Raises:
        ExportError: If the delta is damaged or made for other weights, or the folder cannot be written.
    """
    delta = read_delta(delta_path)
    with new_folder(path, force=force) as building:
        model = apply_delta(delta_path, base, device=device, revision=revision)
        write_model(model, building)
        worst = _loaded_back(building, model, delta.base_dtype)
        content = {
            "schema": "nmke.export/1",
            "format": "hf",
            "base": {"source": base, "fingerprint": delta.base_fingerprint, "dtype": delta.base_dtype},
            "content_hash": delta.content_hash,
            "delta": {"schema": SCHEMA, "sha256": file_sha256(delta.path)},
            "versions": versions(),
        }
        RunFolder.write_json(building / MANIFEST, content)
        (building / "README.md").write_text(_card(delta.path, base, path), encoding="utf-8")
    return ExportReport(
        "hf",
        path,
        folder_bytes(path),
        delta.content_hash,
        worst,
        TOLERANCE,
        len(CHECK_PROMPTS),
        load_line(str(path)),
        (f"content hash {delta.content_hash[:12]}, as the delta promises",),
    )


def _loaded_back(folder: Path, model: EditableModel, dtype: str) -> float:
    """Load the folder, compare every weight, and return the largest difference of logits.

    Raises:
        ExportError: If weights or logits are not the model's.
    """
    reloaded = load_model(str(folder), dtype=dtype, device=str(model.device))
    if weights_fingerprint(reloaded.model) != weights_fingerprint(model.model):
        raise ExportError(
            "the folder, loaded back, has other weights; nothing is left there: report the model's architecture"
        )
    worst = largest_difference(model, reloaded, CHECK_PROMPTS)
    if not worst <= TOLERANCE:
        raise ExportError(f"the folder, loaded back, gives logits that differ by {worst:.2g}; report this")
    return worst


def _card(delta_file: Path, base: str, path: Path) -> str:
    """The delta's own card, which lists the facts; a short one where only the file was handed on."""
    card = delta_file.parent / "README.md"
    if card.is_file():
        text = card.read_text(encoding="utf-8").partition(LOAD_HEADING)[0]
    else:
        text = (
            f"# {base}, with facts changed\n\n**Facts in this model were changed on purpose and may be wrong.** Made "
            f"with nmke {nmke.__version__} from `{delta_file.name}`, which came without its list of facts.\n\n"
        )
    return f"{text}{LOAD_HEADING}\n\n    {load_line(path.name)}\n"
