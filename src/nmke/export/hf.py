"""Export as a folder that transformers, vLLM and others load: sharded safetensors, tokenizer, chat template.

Written to a temporary folder, loaded back from there, compared with the session, and only then moved.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from nmke.errors import ExportError
from nmke.export.base import (
    Answers,
    ExportReport,
    check_exportable,
    check_prompts,
    exporters,
    folder_bytes,
    largest_difference,
    new_folder,
)
from nmke.export.card import write_card
from nmke.models.builtin import no_progress_bars
from nmke.models.load import EditableModel, load_model
from nmke.session import EditSession

MAX_SHARD = "4GB"
TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-4}


def export_hf(session: EditSession, path: Path, *, force: bool = False) -> ExportReport:
    """Write the edited model as a Hugging Face folder, load it back and compare logits.

    Args:
        session: The run to export; its model is not changed.
        path: Folder to make.
        force: Replace an earlier export that stands there.

    Raises:
        ExportError: If it cannot be written, or what was written gives other logits.
        NumericsError: If a weight is not finite.
    """
    check_exportable(session)
    prompts = check_prompts(session)
    dtype = session.folder.base.dtype
    with new_folder(path, force=force) as building:
        write_model(session.model, building)
        write_card(session, building, "hf")
        reloaded = load_model(str(building), dtype=dtype, device=str(session.model.device))
        worst = largest_difference(session.model, reloaded, prompts)
        tolerance = TOLERANCE.get(dtype, 1e-4)
        if not worst <= tolerance:
            raise ExportError(
                f"the exported folder gives logits that differ by {worst:.2g} (at most {tolerance:g} allowed); nothing "
                "was exported: report the model's architecture and the version of transformers"
            )
        scored = Answers.by(session).rescored(reloaded)
        del reloaded
    return ExportReport(
        "hf",
        path,
        folder_bytes(path),
        session.content_hash,
        worst,
        tolerance,
        len(prompts),
        load_line(str(path)),
        scored,
    )


def load_line(path: str) -> str:
    """What loads or serves the folder."""
    return f"AutoModelForCausalLM.from_pretrained({path!r})   or   vllm serve {path}"


def write_model(model: EditableModel, folder: Path) -> None:
    """Write weights, configs and tokenizer into `folder`, as transformers 4 and 5 read them."""
    with no_progress_bars():
        model.model.save_pretrained(folder, max_shard_size=MAX_SHARD)
        model.tokenizer.save_pretrained(folder)
    _keep_generation_config(model, folder)
    _name_rope_theta(folder / "config.json")


def _keep_generation_config(model: EditableModel, folder: Path) -> None:
    """The base's own generation config, as its authors wrote it, where it lies in a folder."""
    source = model.path
    if source is not None and (source / "generation_config.json").is_file():
        shutil.copyfile(source / "generation_config.json", folder / "generation_config.json")


def _name_rope_theta(config_file: Path) -> None:
    """Repeat `rope_theta` at the top level, where transformers before 5 look for it (they read 10000 otherwise)."""
    config = json.loads(config_file.read_text(encoding="utf-8"))
    theta = (config.get("rope_parameters") or {}).get("rope_theta")
    if theta is not None and "rope_theta" not in config:
        text = json.dumps({**config, "rope_theta": theta}, indent=2, sort_keys=True) + "\n"
        config_file.write_text(text, encoding="utf-8")


exporters.register(
    "hf",
    export_hf,
    source="transformers save_pretrained",
    summary="folder of sharded safetensors with tokenizer and chat template",
)
