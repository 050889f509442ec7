"""Export as a LoRA adapter in PEFT's layout: the change of each down-projection as a product of two thin matrices.

Goes on the base in any precision, also on a quantised copy. An edit writes in few directions, so the adapter is
exact up to rounding once its rank reaches the number of directions; the rank is one that vLLM accepts. What the
weights' own type rounded off when the edits were written is noise of full rank: it is not part of the adapter.

Source: Hu et al. 2021, arXiv:2106.09685; layout as of peft 0.17 to 0.21.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from nmke.errors import ConfigError, ExportError
from nmke.export.base import (
    ExportReport,
    check_finite,
    check_prompts,
    exporters,
    folder_bytes,
    last_logits,
    new_folder,
)
from nmke.export.card import write_card
from nmke.export.changes import Change, changes, logits_apart
from nmke.export.low_rank import direction_energies, factors, residual_energies, rounding_energy
from nmke.models.builtin import BUILTIN_MODELS
from nmke.models.load import EditableModel
from nmke.session import EditSession

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
LOST_ENERGY = 1e-6
TOLERANCE = {torch.float32: 1e-2, torch.bfloat16: 0.5}
_PREFIX = "base_model.model."


@dataclass(frozen=True)
class _Spectrum:
    """The directions of one change: how much of it each rank leaves over, and how much may be left."""

    change: Change
    vectors: Tensor
    left_over: list[float]
    allowed: float

    def residual(self, rank: int) -> float:
        """‖ΔW - BA‖ / ‖ΔW‖ at this rank."""
        return math.sqrt(self.left_over[min(rank, len(self.left_over) - 1)] / self.left_over[0])

    def fits(self, rank: int) -> bool:
        """Whether what this rank leaves over is small enough."""
        return self.left_over[min(rank, len(self.left_over) - 1)] <= self.allowed


def export_lora(
    session: EditSession, path: Path, *, force: bool = False, rank: int | None = None
) -> ExportReport:
    """Write the adapter, read it back, run the base with it and compare logits with the session's.

    They may differ by 0.01 in float32 and by 0.5 in bfloat16, where the session's weights carry the rounding of
    every batch and the adapter does not.

    Args:
        session: The run to export; its model is afterwards as before.
        path: Folder to make, with `adapter_config.json`, `adapter_model.safetensors` and a model card.
        force: Replace an earlier export that stands there.
        rank: Of the adapter; None takes the smallest of vLLM's that loses 1e-6 of the change's energy at most, or
            no more than rounding to the weights' type did.

    Raises:
        ConfigError: If `rank` is below 1.
        ExportError: If nothing is changed, it cannot be written, or it does not reproduce the session's logits.
        NumericsError: If a weight is not finite.
    """
    if rank is not None and rank < 1:
        raise ConfigError(f"rank {rank} asked; a LoRA adapter has rank 1 or more")
    check_finite(session)
    changed = changes(session)
    if not changed:
        raise ExportError(
            "the run changes nothing, so there is no adapter to write; use the base model as it is"
        )
    prompts = check_prompts(session)
    expected = last_logits(session.model, prompts)
    roundings = len(session.ledger.active())
    spectra = [_spectrum(change, roundings) for change in changed]
    fitting = next((r for r in VLLM_RANKS if all(s.fits(r) for s in spectra)), VLLM_RANKS[-1])
    chosen = rank or fitting
    worst_layer = max(spectra, key=lambda s: s.residual(chosen))
    residual = worst_layer.residual(chosen)
    tolerance = TOLERANCE.get(session.model.dtype, TOLERANCE[torch.bfloat16])
    base = _base_place(session.model)
    with new_folder(path, force=force) as building:
        _write_adapter(building, session.model, spectra, chosen, base)
        write_card(session, building, "lora", load=_load_lines(path.name, base, chosen))
        with session.base(), _adapted(session.model.model, building):
            worst = logits_apart(last_logits(session.model, prompts), expected)
        if not worst <= tolerance:
            raise ExportError(
                f"an adapter of rank {chosen} leaves {residual:.2g} of the change and gives logits that differ by "
                f"{worst:.2g} (at most {tolerance:g} allowed); nothing was exported: "
                + (f"give rank {fitting}" if chosen < fitting else "export as hf or delta, which are exact")
            )
    return ExportReport(
        "lora",
        path,
        folder_bytes(path),
        session.content_hash,
        worst,
        tolerance,
        len(prompts),
        _load_lines(str(path), base, chosen),
        _notes(chosen, residual, worst_layer.change),
    )


def _spectrum(change: Change, roundings: int) -> _Spectrum:
    update = _update(change)
    energies, vectors = direction_energies(update)
    left_over = residual_energies(energies)
    rounding = 1.1 * roundings * rounding_energy(change.edited[:, change.columns])
    allowed = max(LOST_ENERGY * float(left_over[0]), rounding)
    return _Spectrum(change, vectors, left_over.tolist(), allowed)


def _update(change: Change) -> Tensor:
    return change.edited.double() - change.base.double()


def _write_adapter(
    folder: Path, model: EditableModel, spectra: Sequence[_Spectrum], rank: int, base: str
) -> None:
    modules = [s.change.module for s in spectra]
    transposed = isinstance(model.model.get_submodule(modules[0]), Conv1D)  # one architecture, one kind
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": rank,  # scaling alpha / r is 1
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": transposed,
        "target_modules": modules,
        "modules_to_save": None,
        "init_lora_weights": True,
        "inference_mode": True,
        "use_rslora": False,
        "use_dora": False,
    }
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (folder / "adapter_config.json").write_text(text, encoding="utf-8")
    tensors = {}
    for spectrum in spectra:
        left, right = factors(_update(spectrum.change), spectrum.vectors, rank)
        name = _PREFIX + spectrum.change.module
        tensors[f"{name}.lora_A.weight"] = right.cpu().contiguous()  # [rank d_mlp], for Conv1D too
        tensors[f"{name}.lora_B.weight"] = left.cpu().contiguous()  # [d_model rank]
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


@contextmanager
def _adapted(model: nn.Module, folder: Path) -> Iterator[None]:
    """The model with the adapter in `folder` beside its weights, computed as PEFT computes it."""
    tensors = load_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    scaling = config["lora_alpha"] / config["r"]
    with ExitStack() as hooks:
        for path in config["target_modules"]:
            hook = _adding(tensors, _PREFIX + path, scaling)
            hooks.callback(model.get_submodule(path).register_forward_hook(hook).remove)
        yield


def _adding(tensors: Mapping[str, Tensor], name: str, scaling: float) -> Any:
    down, up = tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"]

    def hook(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        inputs = args[0].to(down.dtype)  # [... d_mlp]
        added = inputs @ down.to(inputs.device).T @ up.to(inputs.device).T  # [... d_model]
        return (output + scaling * added).to(output.dtype)

    return hook


def _base_place(model: EditableModel) -> str:
    """Where others load the base from: a built-in model's name means nothing to them."""
    return str(model.path) if model.source in BUILTIN_MODELS and model.path else model.source


def _load_lines(path: str, base: str, rank: int) -> str:
    served = next((r for r in VLLM_RANKS if r >= rank), rank)
    return (
        f"PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({base!r}), {path!r})   or   "
        f"vllm serve {base} --enable-lora --max-lora-rank {served} --lora-modules edited={path}"
    )


def _notes(rank: int, residual: float, change: Change) -> tuple[str, ...]:
    notes = [
        f"rank {rank}, alpha {rank}; residual ‖ΔW - BA‖/‖ΔW‖ at most {residual:.2g} (layer {change.layer})",
        "`pip install 'nmke[lora]'` brings peft, which loads it; a quantised copy of the base is fine",
    ]
    if rank > VLLM_RANKS[-1]:
        notes.append(f"vLLM takes ranks up to {VLLM_RANKS[-1]}, this one is for peft")
    return tuple(notes)


exporters.register(
    "lora",
    export_lora,
    source="arXiv:2106.09685",
    summary="PEFT adapter on the down-projections, for peft and vLLM",
)
