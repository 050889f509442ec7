"""Where things that can be rebuilt are kept, how they get there whole, and what they are keyed by."""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import platformdirs

ABANDONED_AFTER_SECONDS = 24 * 3600


def cache_dir() -> Path:
    """The cache folder: `NMKE_CACHE` if set, else the platform's own place; it may not exist yet."""
    chosen = os.environ.get("NMKE_CACHE")
    return Path(chosen).expanduser().resolve() if chosen else Path(platformdirs.user_cache_dir("nmke"))


@contextmanager
def atomic_directory(target: Path, *, replace: bool = False) -> Iterator[Path]:
    """Fill a temporary folder that becomes `target` in one step when the block ends without an error.

    The temporary folder lies beside the target. On an error it is removed; after a kill it stays under
    a name that nobody reads, and the next call for the same target removes it. When several processes
    build the same target, one result is kept and no reader ever sees half of one.

    Args:
        target: The folder to create; its parents are made.
        replace: Put the new folder in place of an existing one; otherwise the existing one stays.

    Yields:
        The temporary folder, empty.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(target)
    building = _temporary_beside(target)
    try:
        yield building
        building.chmod(0o777 & ~_umask())
        _move_into_place(building, target, replace=replace)
    finally:
        shutil.rmtree(building, ignore_errors=True)


@contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """A path beside `target` to write to; it takes `target`'s place when the block ends without an error.

    The data is on the disk before the name is, so that a killed process or a power cut leaves the old file
    or the new one.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb+") as written:
            os.fsync(written.fileno())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def weights_fingerprint(model: Any) -> str:
    """Sha256 over names, types, shapes and bytes of a model's parameters and persistent buffers."""
    import torch

    digest = hashlib.sha256()
    saved = set(model.state_dict())
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in saved}
    for name, tensor in sorted({**dict(model.named_parameters()), **buffers}.items()):
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        flat = tensor.detach().cpu().contiguous().flatten()
        digest.update(memoryview(flat.view(torch.uint8).numpy()))
    return digest.hexdigest()


def _move_into_place(building: Path, target: Path, *, replace: bool) -> None:
    if replace and target.exists():
        retired = _temporary_beside(target)
        try:
            target.replace(retired / "old")
        except FileNotFoundError:
            pass  # another process has just retired it
        finally:
            shutil.rmtree(retired, ignore_errors=True)
    try:
        building.replace(target)
    except OSError:
        if not target.is_dir():
            raise
        # another process finished the same folder first; its result stands


def _temporary_beside(target: Path) -> Path:
    prefix = f"{_temporary_stem(target)}{socket.gethostname()}-{os.getpid()}-"
    return Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))


def _temporary_stem(target: Path) -> str:
    return f".{target.name}.tmp-"


def _remove_abandoned(target: Path) -> None:
    """Remove temporary folders whose process is gone."""
    stem = _temporary_stem(target)
    for folder in target.parent.glob(f"{stem}*"):
        host, pid, _ = folder.name.removeprefix(stem).rsplit("-", 2)
        if _is_abandoned(folder, host, pid):
            shutil.rmtree(folder, ignore_errors=True)


def _is_abandoned(folder: Path, host: str, pid: str) -> bool:
    if os.name == "posix" and host == socket.gethostname() and pid.isdecimal():
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            return False
        return False
    try:
        return time.time() - folder.stat().st_mtime > ABANDONED_AFTER_SECONDS
    except FileNotFoundError:
        return False


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
