"""Beginning a run on a model, and deleting one."""

from __future__ import annotations

import shutil
from datetime import datetime, timezone
from pathlib import Path

import nmke
from nmke.config import EditConfig
from nmke.editors.contexts import write_contexts
from nmke.errors import ConfigError, LedgerError
from nmke.models.load import EditableModel, load_model
from nmke.run_folder import BaseInfo, RunFolder


def begin_run(
    root: Path,
    model: EditableModel,
    config: EditConfig,
    revision: str | None,
    contexts: tuple[str, ...] | None = None,
) -> RunFolder:
    """Make the folder of a new run.

    Args:
        root: Where.
        model: The unedited model.
        config: Settings that were given.
        revision: Hub revision, if one was asked for.
        contexts: Prefixes of every prompt; None has the model write them.

    Raises:
        LedgerError: If something that is not an empty folder stands at `root`.
    """
    dtype = str(model.dtype).removeprefix("torch.")
    base = BaseInfo(model.source, model.name, model.fingerprint, dtype, revision)
    contexts = contexts or write_contexts(model, config.context_tokens, config.seed)
    created = datetime.now(timezone.utc).isoformat(timespec="seconds")
    folder = RunFolder.create(root, base, contexts, created, nmke.__version__)
    given = config.model_dump(exclude_unset=True)
    if given:
        folder.write_recipe(given)
    return folder


def delete_run(root: Path) -> None:
    """Delete what stands at `root`, if it is a run folder or empty.

    Raises:
        LedgerError: If it is something else, or a process writes to it.
    """
    if not RunFolder.exists(root):
        if not root.is_dir() or any(root.iterdir()):
            raise LedgerError(
                f"--force deletes run folders only and {str(root)!r} is none; choose another output"
            )
        root.rmdir()
        return
    with RunFolder(root).locked():
        shutil.rmtree(root)


def check_source(folder: RunFolder, source: str) -> None:
    """Raise unless the run was begun on the model that is named.

    Raises:
        ConfigError: If it was begun on another.
    """
    base = folder.base
    if source not in (base.source, base.name) and str(Path(source).resolve()) != base.source:
        raise ConfigError(f"run {str(folder.root)!r} edits {base.source!r}, not {source!r}; name that model")


def load_base(folder: RunFolder, device: str, model: EditableModel | None = None) -> EditableModel:
    """The unedited model of a run.

    Args:
        folder: The run.
        device: Where to load it.
        model: Already loaded; checked only.

    Raises:
        LedgerError: If its weights are not those that the run was begun on.
    """
    base = folder.base
    model = model or load_model(base.source, dtype=base.dtype, device=device, revision=base.revision)
    if model.fingerprint != base.fingerprint:
        raise LedgerError(
            f"run {str(folder.root)!r} edits weights {base.fingerprint[:12]}, {model.source!r} now has "
            f"{model.fingerprint[:12]}; give the original base model"
        )
    return model
