"""The folder of one run: where its files stand, what it says about its base model, and who may write to it."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from nmke.config import parse_layers, read_config
from nmke.damage import load_json, reason
from nmke.errors import LedgerError, RequestError
from nmke.models.cache import atomic_file

logger = logging.getLogger(__name__)
SCHEMA = "nmke.run/1"
RECIPE = "recipe.yaml"


@dataclass(frozen=True)
class BaseInfo:
    """The model that a run edits; it is never copied and never changed.

    Args:
        source: Built-in name, absolute folder or hub id, as it can be loaded again.
        name: Short name.
        fingerprint: Hash of its weights.
        dtype: Type its weights are loaded in, such as "float32".
        revision: Hub revision, if one was asked for.
    """

    source: str
    name: str
    fingerprint: str
    dtype: str
    revision: str | None = None


@dataclass(frozen=True)
class RunFolder:
    """Paths of one run.

    Args:
        root: The folder.
    """

    root: Path

    @property
    def manifest(self) -> Path:
        """`nmke.json`: schema, base model, contexts, versions."""
        return self.root / "nmke.json"

    @property
    def ledger(self) -> Path:
        """The append-only record."""
        return self.root / "ledger.sqlite"

    @property
    def edits(self) -> Path:
        """One file per batch."""
        return self.root / "edits"

    @property
    def head(self) -> Path:
        """The edited matrices as they are after the last event."""
        return self.root / "head"

    @staticmethod
    def exists(path: Path) -> bool:
        """Whether `path` is a run folder."""
        return (path / "nmke.json").is_file()

    @classmethod
    def create(
        cls, root: Path, base: BaseInfo, contexts: tuple[str, ...], created: str, version: str
    ) -> RunFolder:
        """Make a new run folder.

        Raises:
            LedgerError: If something that is not an empty folder stands there.
        """
        _refuse_occupied(root)
        folder = cls(root)
        root.mkdir(parents=True, exist_ok=True)
        content = {
            "schema": SCHEMA,
            "base": asdict(base),
            "contexts": list(contexts),
            "created": created,
            "nmke": version,
        }
        with folder.locked():
            _refuse_occupied(root)  # another process may have begun the same run
            folder.edits.mkdir(exist_ok=True)
            folder.head.mkdir(exist_ok=True)
            folder.write_json(folder.manifest, content)
        return folder

    @classmethod
    def open(cls, root: Path) -> RunFolder:
        """An existing run folder.

        Raises:
            RequestError: If there is none.
            LedgerError: If a link in it leads out of it: what is written to the run stays in its folder.
        """
        if not cls.exists(root):
            raise RequestError(
                f"{str(root)!r} is not a run folder: it has no nmke.json; make one with `nmke edit ... -o`"
            )
        _refuse_links(root)
        return cls(root)

    def read_manifest(self) -> dict[str, Any]:
        """The content of `nmke.json`.

        Raises:
            LedgerError: If it is damaged or of another schema.
        """
        try:
            content = load_json(self.manifest.read_text(encoding="utf-8"))
            found = content["schema"]
            base, contexts = BaseInfo(**content["base"]), content["contexts"]
            texts = [base.source, base.name, base.fingerprint, base.dtype, base.revision or "", *contexts]
            if not all(isinstance(text, str) for text in texts):
                raise TypeError("a field that must be a text is none")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise LedgerError(
                f"{str(self.manifest)!r} is damaged ({reason(error)}); restore it from a backup"
            ) from error
        if found != SCHEMA:
            raise LedgerError(
                f"{str(self.manifest)!r} has schema {found!r}, this version reads {SCHEMA!r}; update nmke"
            )
        return dict(content)

    @property
    def base(self) -> BaseInfo:
        """The model this run edits."""
        return BaseInfo(**self.read_manifest()["base"])

    @property
    def contexts(self) -> tuple[str, ...]:
        """The prefixes every prompt of this run is optimised under."""
        return tuple(self.read_manifest()["contexts"])

    @property
    def recipe(self) -> dict[str, Any]:
        """The settings that were given to the run, {} when there were none.

        Raises:
            ConfigError: If `recipe.yaml` is damaged.
        """
        path = self.root / RECIPE
        found = read_config(path) if path.is_file() else {}
        return {**found, "layers": parse_layers(found["layers"])} if "layers" in found else found

    def write_recipe(self, settings: Mapping[str, Any]) -> None:
        """Keep settings for edits to come, as `recipe.yaml`."""
        plain = {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}
        with atomic_file(self.root / RECIPE) as temporary:
            temporary.write_text(yaml.safe_dump(plain, sort_keys=False, allow_unicode=True), encoding="utf-8")

    def digest(self) -> str:
        """sha256 of `nmke.json`: what every event is bound to."""
        return hashlib.sha256(self.manifest.read_bytes()).hexdigest()

    @staticmethod
    def edits_name(seq: int) -> str:
        """The batch file of an event, relative to the folder."""
        return f"edits/{seq:06d}.safetensors"

    @staticmethod
    def head_name(seq: int) -> str:
        """The head file of an event, relative to the folder."""
        return f"head/{seq:06d}.safetensors"

    def newest_file(self) -> int:
        """Highest event number that a file of the run is named after, 0 without files."""
        found = (p.stem for folder in (self.edits, self.head) for p in folder.glob("[0-9]*.safetensors"))
        return max(map(int, found), default=0)

    def remove_leftovers(self, named: Collection[str]) -> None:
        """Remove what a killed process left: half-written files, and files that no event names.

        Args:
            named: Files to keep, relative to the folder.
        """
        for name in (self.manifest.name, RECIPE, "reproduce.json"):
            for path in self.root.glob(f".{name}.*.tmp"):
                path.unlink(missing_ok=True)
        for folder in (self.edits, self.head):
            unfinished = (
                *folder.glob(".*.tmp"),
                *folder.glob(".tmp*"),
            )  # ours, and those of safetensors itself
            for path in [*unfinished, *folder.glob("[0-9]*.safetensors")]:
                if f"{folder.name}/{path.name}" not in named:
                    logger.info("removing leftover %s", path)
                    path.unlink(missing_ok=True)

    @staticmethod
    def write_json(path: Path, content: dict[str, Any]) -> None:
        """Write a JSON file whole or not at all."""
        with atomic_file(path) as temporary:
            temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the right to write; the operating system frees it when the process ends, however it ends.

        Raises:
            LedgerError: If another process holds it; names its pid.
        """
        with (self.root / "lock").open("a+", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                file.seek(0)
                raise LedgerError(
                    f"run {str(self.root)!r} is being written by process {file.read().strip() or 'unknown'}; "
                    "wait for it or stop it"
                ) from error
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            try:
                yield
            finally:
                fcntl.flock(file, fcntl.LOCK_UN)


def _refuse_links(root: Path) -> None:
    """Raise if a link inside the folder leads out of it."""
    inside = root.resolve()
    for folder, folders, files in os.walk(root):
        for name in (*folders, *files):
            path = Path(folder, name)
            if path.is_symlink() and not path.resolve().is_relative_to(inside):
                raise LedgerError(
                    f"{str(path)!r} is a link that leads out of the run folder, to {str(path.resolve())!r}; a run is "
                    "written inside its folder only: put the files there, or remove the link"
                )


def _refuse_occupied(root: Path) -> None:
    """Raise unless `root` is free; what a process killed while beginning a run left there does not count."""
    if not root.exists():
        return
    if not root.is_dir() or any(not is_leftover(path) for path in root.iterdir()):
        raise LedgerError(
            f"output {str(root)!r} exists and is not empty; continue a run with --resume, "
            "replace it with --force, or choose another folder"
        )


def is_leftover(path: Path) -> bool:
    """Whether it is what a process killed while it began a run leaves, which counts as nothing."""
    if path.is_symlink():
        return False
    if path.name in ("edits", "head"):
        return path.is_dir() and not any(path.iterdir())
    return path.name == "lock" or (path.name.startswith(".nmke.json.") and path.suffix == ".tmp")
