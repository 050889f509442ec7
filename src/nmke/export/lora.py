"""Export as a LoRA adapter in PEFT's layout: the change of each MLP matrix as a product of two thin matrices.

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
    Answers,
    ExportReport,
    answered,
    check_exportable,
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
ROUNDING_MARGIN = 1.1
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.5}
EFFECT_SHARE = 0.01
_PREFIX = "base_model.model."


@dataclass(frozen=True)
class _Spectrum:
    """The directions of one change, the squared norm each rank leaves over, and that of the rounding noise."""

    change: Change
    vectors: Tensor
    left_over: list[float]
    rounding_energy: float

    def residual(self, rank: int) -> float:
        """‖ΔW - BA‖ / ‖ΔW‖ at this rank."""
        return math.sqrt(self.left_over[min(rank, len(self.left_over) - 1)] / self.left_over[0])

    @property
    def rounding(self) -> float:
        """Norm of what rounding to the weights' type is expected to have added, relative to ‖ΔW‖."""
        return math.sqrt(self.rounding_energy / self.left_over[0])

    def fits(self, rank: int) -> bool:
        """Whether this rank leaves over no more than the energy that may be lost or that rounding explains."""
        allowed = max(LOST_ENERGY, ROUNDING_MARGIN * self.rounding**2)
        return self.residual(rank) ** 2 <= allowed


def export_lora(
    session: EditSession, path: Path, *, force: bool = False, rank: int | None = None
) -> ExportReport:
    """Write the adapter, read it back, run the base with it and compare logits with the session's.

    They may differ by 1e-4 in float32 or 0.5 in bfloat16, which is that arithmetic's own scatter, plus a share of
    the most that the edits change any of these logits: 1 %, and the share of ΔW that is rounding to the weights'
    type, since the session's weights carry the rounding of every batch and the adapter does not.

    Args:
        session: The run to export; its model is afterwards as before.
        path: Folder to make, with `adapter_config.json`, `adapter_model.safetensors` and a model card.
        force: Replace an earlier export that stands there.
        rank: Of the adapter; None takes the smallest of vLLM's that loses 1e-6 of the change's energy at most, or
            no more than rounding to the weights' type did.

    Raises:
        ConfigError: If `rank` is below 1.
        ExportError: If nothing or a bias is changed, it cannot be written, or it does not reproduce the session's
            logits.
        NumericsError: If a weight is not finite.
    """
    if rank is not None and rank < 1:
        raise ConfigError(f"rank {rank} asked; a LoRA adapter has rank 1 or more")
    check_exportable(session)
    spectra = _spectra(session)
    said = _Said.by(session)
    chosen = rank or _fitting_rank(spectra)
    worst_layer = max(spectra, key=lambda s: s.residual(chosen))
    tolerance = _tolerance(spectra, said, session.model.dtype)
    base = _base_place(session.model)
    with new_folder(path, force=force) as building:
        _write_adapter(building, session.model, spectra, chosen, base)
        write_card(session, building, "lora", load=_load_lines(path.name, base, chosen))
        with session.base(), _adapted(session.model.model, building):
            apart = logits_apart(last_logits(session.model, said.prompts), said.logits)
            kept = len(said.answers.given & answered(session.model, said.answers.requests))
        if not apart <= tolerance:
            raise _too_far(spectra, chosen, apart, tolerance)
    rescored = f"{kept} of {len(said.answers.given)} edits that the run answers are answered with the adapter"
    load, notes = _load_lines(str(path), base, chosen), (rescored, *_notes(chosen, worst_layer, said.effect))
    size, prompts = folder_bytes(path), len(said.prompts)
    return ExportReport("lora", path, size, session.content_hash, apart, tolerance, prompts, load, notes)


def _fitting_rank(spectra: Sequence[_Spectrum]) -> int:
    """The smallest of vLLM's ranks that loses nothing, else the largest."""
    return next((r for r in VLLM_RANKS if all(s.fits(r) for s in spectra)), VLLM_RANKS[-1])


def _tolerance(spectra: Sequence[_Spectrum], said: _Said, dtype: torch.dtype) -> float:
    share = EFFECT_SHARE + max(s.rounding for s in spectra)
    return share * said.effect + TOLERANCE.get(dtype, TOLERANCE[torch.bfloat16])


def _too_far(spectra: Sequence[_Spectrum], rank: int, apart: float, tolerance: float) -> ExportError:
    fitting = _fitting_rank(spectra)
    return ExportError(
        f"an adapter of rank {rank} leaves {max(s.residual(rank) for s in spectra):.2g} of the change and gives logits "
        f"that differ by {apart:.2g} (at most {tolerance:g} allowed); nothing was exported: "
        + (f"give rank {fitting}" if rank < fitting else "export as hf or delta, which are exact")
    )


@dataclass(frozen=True)
class _Said:
    """What the session's model says, for comparison: logits, their change by the edits, and edits it answers."""

    prompts: list[str]
    logits: list[Tensor]
    effect: float
    answers: Answers

    @classmethod
    def by(cls, session: EditSession) -> _Said:
        """Ask the session's model as it is now."""
        prompts = check_prompts(session)
        logits = last_logits(session.model, prompts)
        with session.base():
            effect = logits_apart(last_logits(session.model, prompts), logits)
        return cls(prompts, logits, effect, Answers.by(session))


def _spectra(session: EditSession) -> list[_Spectrum]:
    """One spectrum per changed tensor.

    Raises:
        ExportError: If nothing is changed, or a bias, which is in no product of two matrices.
    """
    changed = changes(session)
    if not changed:
        raise ExportError(
            "the run changes nothing, so there is no adapter to write; use the base model as it is"
        )
    biased = next(
        (c.module for c in changed if c.with_bias and not torch.equal(c.base[-1], c.edited[-1])), None
    )
    if biased is not None:
        raise ExportError(
            f"an adapter was asked for; the edits change the bias of {biased!r}, which an adapter does not hold: "
            "export as hf or delta"
        )
    roundings = max(1, len(session.ledger.active()))
    return [_spectrum(change, roundings) for change in changed]


def _spectrum(change: Change, roundings: int) -> _Spectrum:
    update = _update(change)
    energies, vectors = direction_energies(update)
    left_over = residual_energies(energies)
    rounding = roundings * rounding_energy(change.edited[:, change.columns])
    return _Spectrum(change, vectors, left_over.tolist(), rounding)


def _update(change: Change) -> Tensor:
    """Change of the weight, [d_model, d_mlp], without the row of biases."""
    update = change.edited.double() - change.base.double()
    return update[:-1] if change.with_bias else update


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
        if spectrum.change.reads:  # the module's own weight is the transpose
            left, right = right.T, left.T
        tensors[f"{name}.lora_A.weight"] = right.cpu().contiguous()  # [rank d_in], for Conv1D too
        tensors[f"{name}.lora_B.weight"] = left.cpu().contiguous()  # [d_out rank]
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
        inputs = args[0].to(down.dtype)  # [... d_in]
        added = inputs @ down.to(inputs.device).T @ up.to(inputs.device).T  # [... d_out]
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


def _notes(rank: int, worst: _Spectrum, effect: float) -> tuple[str, ...]:
    residual, noise = worst.residual(rank), worst.rounding
    dtype = str(worst.change.edited.dtype).removeprefix("torch.")
    explained = (
        f", of which rounding to {dtype} explains {noise:.2g}" if noise > 10 * LOST_ENERGY**0.5 else ""
    )
    notes = [
        f"rank {rank}, alpha {rank}; residual ‖ΔW - BA‖/‖ΔW‖ at most {residual:.2g} (layer {worst.change.place.layer})"
        + explained,
        f"the edits themselves change the compared logits by up to {effect:.2g}",
        "peft loads it (`pip install 'nmke[lora]'`); a quantised copy of the base is fine",
    ]
    if rank > VLLM_RANKS[-1]:
        notes.append(f"vLLM takes ranks up to {VLLM_RANKS[-1]}, this one is for peft")
    return tuple(notes)


exporters.register(
    "lora",
    export_lora,
    source="arXiv:2106.09685",
    summary="PEFT adapter on the edited MLP matrices, for peft and vLLM",
)
