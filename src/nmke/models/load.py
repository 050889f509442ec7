"""From a name to a model that can be edited: hub id, local folder, GGUF file or built-in name.

Precision, device, evaluation mode and what is refused are decided here; text goes through `tokens.py`,
structure through `layout.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from nmke.errors import (
    ConfigError,
    LayoutError,
    MemoryPlanError,
    NmkeError,
    NumericsError,
    RequestError,
    is_out_of_memory,
    unknown_name,
)
from nmke.models.builtin import BUILTIN_MODELS, builtin_folder, no_progress_bars, read_gguf
from nmke.models.cache import weights_fingerprint
from nmke.models.files import check_gguf, check_sizes, held_weights, weight_files
from nmke.models.generate import Decoding, continue_prompts, first_line
from nmke.models.mirror import Mirror
from nmke.models.tokens import TextEncoder, TokenBatch
from nmke.types import MatrixPlace

if TYPE_CHECKING:
    from nmke.models.layout import ModelLayout

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "auto": "auto"}
SPREAD = "spread"  # as a device: the layers over all devices, by accelerate
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
BARE_NAME = re.compile(r"[\w.-]+")
MOST_TIED = 2  # weights of a model to each in its files: tied ones are stored once


@dataclass
class EditableModel:
    """A causal language model with all that editing needs to know about it.

    Args:
        model: The transformers model, in evaluation mode, without gradients on its parameters.
        tokenizer: Its tokenizer, unchanged.
        encoder: The one way from text to ids.
        layout: Where layers, down-projections, norm and unembedding are.
        name: Short name for tables and folders.
        source: What was asked for: built-in name, absolute path or hub id.
        path: Folder or file it was read from, None for the hub and for models made in Python.
        dtype: Type of the parameters.
        device: Where the input goes.
        replayable: Whether `nmke.models.replay` reproduces it; None until tried.
        packable: Whether it does so without padding; None until tried.
        half_products: Whether its blocks run on copies that multiply in bfloat16; None until tried.
        unedited: MLP matrices as loaded, of those that were edited since; kept by `WeightsState`.
        revision: Hub revision it was read from, if one was asked for.
        loadable: Whether another process gets the same model from `source`, on one device.
        mirror: What processes that share the work on it were told; see `nmke.models.ranks`.
        recalls: Side memories that are active on it; kept by `SideState`.
        sinks: Whether the last of some tokens is an attention sink; kept by `nmke.editors.rows`.
    """

    model: Any
    tokenizer: Any
    encoder: TextEncoder
    layout: ModelLayout
    name: str
    source: str
    path: Path | None
    dtype: torch.dtype
    device: torch.device
    replayable: bool | None = None
    packable: bool | None = None
    half_products: bool | None = None
    unedited: dict[MatrixPlace, torch.Tensor] = field(default_factory=dict, repr=False)
    revision: str | None = None
    loadable: bool = False
    mirror: Mirror = field(default_factory=Mirror, repr=False)
    recalls: ExitStack = field(default_factory=ExitStack, repr=False)
    sinks: dict[tuple[int, ...], bool] = field(default_factory=dict, repr=False)

    @classmethod
    def wrap(
        cls,
        model: Any,
        tokenizer: Any,
        name: str = "custom",
        source: str | None = None,
        path: Path | None = None,
    ) -> EditableModel:
        """Make a loaded model editable; it is put into evaluation mode and its gradients are switched off.

        Raises:
            LayoutError: If the model's structure is not one that can be edited.
        """
        from nmke.models.layout import probe_layout

        model.eval()
        model.requires_grad_(False)
        layout = probe_layout(model)
        return cls(
            model=model,
            tokenizer=tokenizer,
            encoder=TextEncoder(tokenizer),
            layout=layout,
            mirror=Mirror.of([parts.down_proj for parts in layout.layers]),
            name=name,
            source=source or name,
            path=path,
            dtype=model.dtype,
            device=model.get_input_embeddings().weight.device,
        )

    @cached_property
    def fingerprint(self) -> str:
        """Sha256 over names, types, shapes and bytes of all weights, as they are at the first call."""
        return weights_fingerprint(self.model)

    @property
    def context_length(self) -> int | None:
        """Most tokens the model can read, None where its config gives no limit."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    def inputs(self, batch: TokenBatch) -> dict[str, Any]:
        """Keyword arguments of a forward pass over `batch`, without a key-value cache."""
        return {**batch.inputs_for(self.model), "use_cache": False}

    def generate(
        self,
        prompts: list[str],
        max_new_tokens: int,
        *,
        do_sample: bool = False,
        seed: int | None = None,
        temperature: float = 1.0,
        stop_at_newline: bool = False,
    ) -> list[str]:
        """Continue each prompt; see `nmke.models.generate.continue_prompts`."""
        decoding = Decoding(max_new_tokens, do_sample, seed, temperature, stop_at_newline)
        return continue_prompts(self, prompts, decoding)


def load_model(
    source: str,
    *,
    dtype: str = "float32",
    device: str = "auto",
    device_map: str | dict[str, Any] | None = None,
    revision: str | None = None,
) -> EditableModel:
    """Load a model for editing; the source itself is only read.

    Args:
        source: Built-in name, `.gguf` file, local folder, or hub id, looked up in this order.
        dtype: "float32", "bfloat16", or "auto" for the type it was saved in.
        device: "auto" (CUDA if there is any), "cpu", "cuda", "cuda:1", or "spread": `device_map` "auto".
        device_map: Spread the layers over devices, as accelerate does; `device` is then not used.
        revision: Branch, tag or commit on the hub.

    Raises:
        RequestError: If the source does not exist or lacks a file, or its weights are pickled.
        ConfigError: If dtype or device is unknown or not there.
        LayoutError: If the model needs its own code, is quantised, or has a structure that cannot be edited.
        NumericsError: If a weight is NaN or infinite.
        MemoryPlanError: If the model does not fit on the device.
    """
    if device == SPREAD and device_map is None:
        device_map = "auto"
    target = _check_device("cpu" if device == SPREAD else device)
    torch_dtype = _check_dtype(dtype)
    path = _find(source)
    options = {"revision": revision} if path is None and revision else {}
    with _explained(source, path):
        if path is not None and path.is_file():
            model, tokenizer = read_gguf(path, torch_dtype, device_map)
        else:
            model, tokenizer = _read_folder(str(path or source), torch_dtype, device_map, options)
        if device_map is None:
            model.to(target)
    _check_finite(model)
    origin = source if source in BUILTIN_MODELS or path is None else str(path)
    found = EditableModel.wrap(model, tokenizer, Path(origin).name.removesuffix(".gguf"), origin, path)
    found.revision, found.loadable = revision, device_map is None
    return found


def _check_dtype(dtype: str) -> Any:
    if dtype not in DTYPES:
        raise ConfigError(unknown_name("dtype", dtype, DTYPES))
    return DTYPES[dtype]


def _check_device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(
            f"unknown device {device!r}; use 'auto', 'cpu', 'cuda', 'cuda:N' or 'spread'"
        ) from error
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        found = torch.cuda.device_count()
        raise ConfigError(f"device {device!r} was asked for, {found} CUDA devices were found; use 'cpu'")
    return chosen


def _find(source: str) -> Path | None:
    """Local place of the source, or None when it is to be looked up on the hub."""
    if source in BUILTIN_MODELS:
        return builtin_folder(source)
    path = Path(source).expanduser()
    if path.is_dir():
        _check_folder(path)
        return path.resolve()
    if path.is_file():
        with path.open("rb") as file:
            is_gguf = file.read(4) == b"GGUF"
        if is_gguf:
            check_gguf(path)
            return path.resolve()
        raise RequestError(f"{source!r} is a file, but not in GGUF format; name a GGUF file or a folder")
    if BARE_NAME.fullmatch(source) and path.suffix.lower() != ".gguf":
        raise RequestError(
            f"{unknown_name('model', source, BUILTIN_MODELS)}, or a folder; a model on the hub is named with its "
            "owner, such as 'openai-community/gpt2'"
        )
    if not HUB_ID.fullmatch(source) or path.suffix.lower() == ".gguf":
        raise RequestError(
            f"no model at {source!r}: there is no such folder or file, and it is no hub id; check the path, "
            f"or use a built-in model: {', '.join(BUILTIN_MODELS)}"
        )
    return None


def _check_folder(folder: Path) -> None:
    """Refuse a folder that lacks what a model needs, before transformers guesses."""
    if not (folder / "config.json").is_file():
        adapter = (folder / "adapter_config.json").is_file()
        cure = "merge the adapter into its base first" if adapter else "give a folder saved by transformers"
        raise RequestError(f"model folder {str(folder)!r} has no config.json; {cure}")
    pickled = sorted(file.name for kind in ("*.bin", "*.pt", "*.pth") for file in folder.glob(kind))
    if not any(folder.glob("*.safetensors")) and pickled:
        raise RequestError(
            f"model folder {str(folder)!r} has only pickled weights ({pickled[0]}), which can run code when "
            "read; convert them where you trust them: AutoModelForCausalLM.from_pretrained(folder)"
            ".save_pretrained(new_folder)"
        )
    missing = _missing_weights(folder)
    if missing:
        raise RequestError(f"model folder {str(folder)!r} has no {missing[0]}; copy the weights again")
    check_sizes(folder)


def _missing_weights(folder: Path) -> list[str]:
    """Names of the safetensors files that should be in the folder and are not."""
    return sorted(name for name in weight_files(folder) if not (folder / name).is_file())


def _read_folder(
    place: str, dtype: torch.dtype | str, device_map: str | dict[str, Any] | None, options: dict[str, str]
) -> tuple[Any, Any]:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    config = AutoConfig.from_pretrained(place, trust_remote_code=False, **options)
    quantised = getattr(config, "quantization_config", None)
    if quantised:
        raise LayoutError(
            f"{place!r} is quantised ({dict(quantised).get('quant_method', 'unknown method')}); "
            "edit the model it was made from and quantise the result"
        )
    downloads = not Path(place).is_dir()
    if not downloads:
        _check_parameters(Path(place), config)
    with nullcontext() if downloads else no_progress_bars():
        model, found = AutoModelForCausalLM.from_pretrained(
            place,
            config=config,
            dtype=dtype,
            device_map=device_map,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **options,
        )
    missing = sorted(found["missing_keys"])
    if missing:
        raise RequestError(
            f"the weights of {place!r} lack {len(missing)} tensors ({', '.join(missing[:3])}); "
            "the folder is incomplete or its config.json belongs to another model"
        )
    return model, AutoTokenizer.from_pretrained(place, trust_remote_code=False, **options)


def _check_parameters(folder: Path, config: Any) -> None:
    """Refuse weights that are far fewer than the model has: sizes that `config.json` leaves out have large defaults."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):  # takes no memory
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    asked, (_, held) = sum(p.numel() for p in model.parameters()), held_weights(folder)
    if asked > MOST_TIED * held:
        raise RequestError(
            f"{str(folder / 'config.json')!r} describes a model of {asked:,} weights, the weight files hold {held:,}; "
            "the folder is incomplete or its config.json belongs to another model"
        )


@contextmanager
def _explained(source: str, path: Path | None) -> Iterator[None]:
    """Turn what transformers raises on a bad source into one line with a cure."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        raise RequestError(f"the weights of {source!r} are damaged ({error}); copy them again") from error
    except NmkeError:
        raise
    except OSError as error:
        raise RequestError(_not_found(source, path, error)) from error
    except Exception as error:  # what a config.json of a stranger makes a library raise can be anything
        if is_out_of_memory(error):
            raise MemoryPlanError(
                f"{source!r} does not fit on the device; use dtype='bfloat16', device_map='auto', or device='cpu'"
            ) from error
        raise LayoutError(
            f"{source!r} cannot be loaded as a causal language model ({first_line(str(error))}); "
            "a model that needs its own code, or is not causal, cannot be edited"
        ) from error


def _not_found(source: str, path: Path | None, error: OSError) -> str:
    reason = first_line(str(error))
    if path is not None:
        return f"model {str(path)!r} cannot be read ({reason}); save model and tokenizer there again"
    return f"hub model {source!r} cannot be read ({reason}); check id, network, HF_TOKEN, HF_HUB_OFFLINE"


def _check_finite(model: Any) -> None:
    for name, parameter in model.named_parameters():
        if parameter.device.type == "meta":
            raise LayoutError(
                f"weight {name!r} is not in memory but offloaded; "
                "use a device_map that keeps every layer on a device"
            )
        if not torch.isfinite(parameter.sum(dtype=torch.float32)) and not torch.isfinite(parameter).all():
            raise NumericsError(f"weight {name!r} holds NaN or infinity; restore the model from a sound copy")
