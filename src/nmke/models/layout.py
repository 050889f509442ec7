"""Where a causal language model keeps what an edit needs, found by asking the model and never by its name.

Forward passes over six tokens: the first shows the trunk (decoder layers, final norm, unembedding), the
second, with gradients, shows inside each layer which parts mix positions (attention) and which linear layer
writes the MLP's result, the last that text says the same behind padding. Whatever cannot be shown is a
`LayoutError`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from nmke.errors import LayoutError
from nmke.models.blocks import LayerParts, find_parts, same_map
from nmke.models.norms import FrozenNorm, LogitMap, crafted_scores, fit_logit_map
from nmke.models.probing import (
    TOKENS,
    Call,
    at_row,
    close,
    evaluating,
    gradient,
    has_rows,
    record_calls,
    rows,
)
from nmke.models.tokens import pad_batch
from nmke.models.tracing import replace_output
from nmke.models.weights import DownProjection

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
PACKED = (torch.uint8, torch.int8, torch.int16, torch.int32)


@dataclass(frozen=True)
class ModelLayout:
    """A causal language model's parts, as probed.

    Args:
        layers: The decoder layers, first to last.
        final_norm: The norm between the last layer and the unembedding.
        final_norm_name: Its path in the model.
        unembedding: The linear layer from d_model to d_vocab.
        unembedding_name: Its path in the model.
        d_model: Width of the residual stream.
        d_vocab: How many tokens the unembedding scores.
        logit_map: What happens to the unembedding's output before it is called logits.
    """

    layers: tuple[LayerParts, ...]
    final_norm: nn.Module
    final_norm_name: str
    unembedding: nn.Module
    unembedding_name: str
    d_model: int
    d_vocab: int
    logit_map: LogitMap

    @property
    def n_layers(self) -> int:
        """How many decoder layers there are."""
        return len(self.layers)

    @property
    def d_mlp(self) -> tuple[int, ...]:
        """How many neurons each layer has."""
        return tuple(layer.d_mlp for layer in self.layers)

    @property
    def direct_write(self) -> bool:
        """True where every down-projection's output is added to the residual stream unchanged.

        False where a norm or a factor stands between, as in Gemma 2 or Granite.
        """
        return all(layer.direct_write for layer in self.layers)


def probe_layout(model: PreTrainedModel) -> ModelLayout:
    """Find the parts of a causal language model that editing reads and writes.

    The model is run on six tokens and left as it was: same weights, same train or eval state, no hooks.

    Args:
        model: Any causal language model with unquantised weights in memory.

    Returns:
        The layout, every part of it verified on the model.

    Raises:
        LayoutError: If a part is missing, ambiguous or behaves otherwise; the message names it and the
            candidates.
    """
    kind = type(model).__name__
    try:
        _refuse_by_storage(model)
        with evaluating(model), torch.inference_mode(False):
            blocks, trunk = _find_trunk(model)
            layers = _find_layers(model, blocks, trunk["d_model"])
            _refuse_padding(model)
    except LayoutError as error:
        raise LayoutError(f"{kind} cannot be edited: {error}") from error.__cause__
    except Exception as error:
        raise LayoutError(
            f"{kind} cannot be edited: a forward pass over {TOKENS} token ids was asked for; found "
            f"{type(error).__name__}: {error}; use a causal language model that runs on token ids alone"
        ) from error
    return ModelLayout(layers=layers, **trunk)


def _refuse_by_storage(model: PreTrainedModel) -> None:
    """Refuse what the weights alone rule out: encoder-decoders, quantised or absent weights."""
    if model.config.is_encoder_decoder:
        raise LayoutError("it is an encoder-decoder, not one stack of layers; use a decoder-only model")
    quantised = "quantised weights cannot be edited exactly, load the model in bfloat16, float16 or float32"
    for path, parameter in model.named_parameters():
        if parameter.is_meta:
            raise LayoutError(f"{path!r} is not in memory (meta device); load the model without offloading")
        if parameter.dtype not in FLOATS:
            raise LayoutError(f"{path!r} is stored as {parameter.dtype}; {quantised}")
        if type(parameter.data) is not Tensor:
            kind = type(parameter.data).__name__
            raise LayoutError(f"{path!r} is a {kind}; sharded weights are not supported, load on one device")
    for path, buffer in model.named_buffers():
        if buffer.dtype in PACKED and buffer.ndim == 2:
            raise LayoutError(f"{path!r} packs weights as {buffer.dtype}; {quantised}")


def _token_ids(model: PreTrainedModel) -> Tensor:
    """Six different token ids [1 seq] without a special meaning, as far as the vocabulary allows."""
    embedding = model.get_input_embeddings()
    weight = dict(embedding.named_parameters(recurse=False)).get("weight")
    if weight is None:
        raise LayoutError(f"the input embedding is a {type(embedding).__name__}; found no table of token ids")
    settings = (model.config.to_dict(), model.config.get_text_config(decoder=True).to_dict())
    # Padding, image and end tokens are integers in the configuration; leaving out its sizes as well does no harm.
    special = {value for each in settings for value in each.values() if isinstance(value, int)}
    plain = [i for i in range(min(len(weight), 4096)) if i not in special] or [0]
    step = max(1, len(plain) // TOKENS)
    return torch.tensor([[plain[i * step % len(plain)] for i in range(TOKENS)]], device=weight.device)


def _forward(model: PreTrainedModel) -> Any:
    return model(input_ids=_token_ids(model), use_cache=False, return_dict=True)


@torch.no_grad()
def _refuse_padding(model: PreTrainedModel) -> None:
    """Refuse a model for which text says something else when padding stands in front of it."""
    if model.dtype == torch.float64:
        return  # eager attention rounds to float32, where the mask's smallest float64 is minus infinity
    ids = _token_ids(model)
    long, short = ids[0].tolist(), ids[0, TOKENS // 2 :].tolist()
    batch = pad_batch([long, short], pad_id=long[0], side="left", device=ids.device)
    bare = batch.input_ids[1:, -len(short) :]
    padded = model(**batch.inputs_for(model), use_cache=False, return_dict=True).logits[1, -1]
    alone = model(input_ids=bare, use_cache=False, return_dict=True).logits[0, -1]
    if not close(padded, alone):
        raise LayoutError(
            "text behind padding gives other logits than text alone: the model reads the padding, as positions or "
            "into a recurrent state; prompts of unequal length could not be answered together, use another model"
        )


def _find_trunk(model: PreTrainedModel) -> tuple[dict[str, nn.Module], dict[str, Any]]:
    """First pass: the decoder layers under their paths, and the layout's fields outside of them."""
    modules = dict(model.named_modules())
    wanted = model.get_output_embeddings()
    name = next((path for path, module in modules.items() if module is wanted), None)
    if name is None:
        raise LayoutError("no unembedding: get_output_embeddings() gives none; use a causal language model")
    crafted: list[Tensor] = []

    def to_crafted(raw: Tensor) -> Tensor:
        crafted.append(crafted_scores(raw))
        return crafted[-1]

    unembedding = modules[name]
    with torch.no_grad(), record_calls(modules) as calls, replace_output(unembedding, to_crafted):
        logits = _forward(model).logits
    call = calls.get(name, Call())
    if call.count != 1 or not call.inputs:
        raise LayoutError(f"the unembedding {name!r} did not run once on {TOKENS} tokens; found no readout")
    if not same_map(unembedding, call.inputs[0], call.output):
        raise LayoutError(f"the unembedding {name!r} is not a plain linear layer; only those are supported")
    blocks = _find_blocks(modules, calls)
    norm, factor = _find_final_norm(list(blocks), calls, call.inputs[0])
    d_vocab, d_model = unembedding.weight.shape
    FrozenNorm.probe(modules[norm], d_model)  # refuses what is no norm, such as a head with a dense layer
    if factor != 1 and unembedding.bias is not None:
        raise LayoutError(
            f"the unembedding {name!r} has a bias and reads a scaled norm; only one of them is supported"
        )
    found = fit_logit_map(crafted[0], logits)
    return blocks, {
        "final_norm": modules[norm],
        "final_norm_name": norm,
        "unembedding": unembedding,
        "unembedding_name": name,
        "d_model": d_model,
        "d_vocab": d_vocab,
        "logit_map": LogitMap(scale=found.scale * factor, softcap=found.softcap),
    }


def _find_blocks(modules: dict[str, nn.Module], calls: dict[str, Call]) -> dict[str, nn.Module]:
    """The members of the outermost module list that took part and holds most parameters."""
    lists = {
        path: [f"{path}.{i}" for i in range(len(module))]
        for path, module in modules.items()
        if isinstance(module, nn.ModuleList) and any(f"{path}.{i}" in calls for i in range(len(module)))
    }
    outermost = [path for path in lists if not any(path.startswith(f"{other}.") for other in lists)]
    if not outermost:
        raise LayoutError("no list of decoder layers took part in the forward pass; found no nn.ModuleList")
    path = max(outermost, key=lambda path: sum(p.numel() for p in modules[path].parameters()))
    for member in lists[path]:
        call = calls.get(member, Call())
        if call.count != 1:
            raise LayoutError(
                f"layer {member!r} ran {call.count} times on plain text; every layer must run exactly once"
            )
        if call.output.shape[:-1] != (1, TOKENS):
            raise LayoutError(
                f"layer {member!r} gives shape {list(call.output.shape)} for one row of {TOKENS} tokens; "
                "needed is [batch seq d_model]"
            )
    for before, after in zip(lists[path], lists[path][1:], strict=False):
        if not _receives(calls[after], calls[before]):
            raise LayoutError(f"layer {after!r} does not read the output of {before!r}; found no plain stack")
    return {member: modules[member] for member in lists[path]}


def _receives(later: Call, earlier: Call) -> bool:
    """True if one of the later module's inputs equals the earlier one's output."""
    return any(torch.equal(each.to(earlier.output.device), earlier.output) for each in later.inputs)


def _find_final_norm(blocks: list[str], calls: dict[str, Call], readout: Tensor) -> tuple[str, float]:
    """The module outside the layers that makes the unembedding's input, and the factor it is still missing."""
    outside = [path for path in calls if path and not any(f"{path}.".startswith(f"{b}.") for b in blocks)]
    readers = [path for path in outside if _receives(calls[path], calls[blocks[-1]])]
    for path in sorted(readers, key=lambda path: calls[path].order):
        made = calls[path].output.to(readout.device)
        if made.shape == readout.shape:
            factor = float((made * readout).sum() / made.square().sum())
            if torch.equal(made, readout):
                return path, 1.0
            if factor != 0 and close(readout, factor * made):
                return path, factor
    raise LayoutError(
        f"no final norm: no module outside the layers makes the unembedding's input from the output of {blocks[-1]!r}; "
        f"candidates that read it: {', '.join(readers) or 'none'}"
    )


def _find_layers(
    model: PreTrainedModel, blocks: dict[str, nn.Module], d_model: int
) -> tuple[LayerParts, ...]:
    """Second pass: the parts inside every layer."""
    inside = {
        f"{name}.{path}" if path else name: module
        for name, block in blocks.items()
        for path, module in block.named_modules()
    }
    leaves: list[Tensor] = []

    def to_leaf(embedded: Tensor) -> Tensor:
        leaves.append(embedded.detach().clone().requires_grad_())
        return leaves[-1].clone()

    embedding = replace_output(model.get_input_embeddings(), to_leaf)
    with torch.enable_grad(), record_calls(inside, isolate=True) as calls, embedding:
        _forward(model)
        _refuse_lookahead(calls[list(blocks)[-1]].output, leaves)
        layers = tuple(
            find_parts(index, name, block, calls, d_model)
            for index, (name, block) in enumerate(blocks.items())
        )
    owners: dict[int, str] = {}
    for layer in layers:
        address = DownProjection(layer.down_proj).read().data_ptr()
        other = owners.setdefault(address, layer.down_proj_name)
        if other != layer.down_proj_name:
            raise LayoutError(
                f"{layer.down_proj_name!r} shares its weights with {other!r}; tied layers are not supported"
            )
    return layers


def _refuse_lookahead(output: Tensor, leaves: list[Tensor]) -> None:
    """Refuse a model whose first position sees later ones."""
    if not leaves or not has_rows(leaves[0]):
        raise LayoutError("the input embedding did not run on the token ids; positions cannot be followed")
    found = gradient(output, leaves[0], at_row(output, 0))
    if found is None:
        raise LayoutError("the layers do not depend on the input embedding; found no causal language model")
    if bool(rows(found)[1:].any()):
        raise LayoutError("position 0 depends on later ones; an encoder cannot be edited, use a causal model")
