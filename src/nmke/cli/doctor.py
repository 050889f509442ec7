"""`nmke doctor`: can this be edited, where, at what cost; without a model, what is installed."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nmke.cli import options
from nmke.cli.console import fact, print_json, say, working
from nmke.cli.opening import Loading, load
from nmke.cli.settings import STATS_SETTINGS, merge, takes_settings

if TYPE_CHECKING:
    from nmke.config import EditConfig
    from nmke.models.load import EditableModel


@takes_settings(*STATS_SETTINGS)
def doctor(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="Model to look at; none: this installation itself.")
    ] = None,
    config: options.Config = None,
    as_json: options.Json = False,
    dtype: options.Dtype = "float32",
    device: options.Device = "auto",
    revision: options.Revision = None,
    settings: dict[str, Any] = {},  # noqa: B006 - filled by takes_settings, never changed
) -> None:
    """Say whether a model can be edited: layers, type, memory, time, what is cached. Changes nothing."""
    given = merge(settings, config)
    if model is None:
        found = installation()
    else:
        from nmke.config import EditConfig
        from nmke.session import resolve

        loaded = load(model, Loading(dtype, device, revision))
        with working("measuring speed"):
            found = examine(loaded, resolve(EditConfig.create(**given), loaded))
    if as_json:
        print_json({"schema": "nmke.doctor/1", **found})
        return
    if model is None:
        _print_installation(found)
    else:
        _print_model(found)


def installation() -> dict[str, Any]:
    """Versions and places."""
    import torch
    import transformers

    import nmke
    from nmke.facts import data_path
    from nmke.models.builtin import BUILTIN_MODELS
    from nmke.models.cache import cache_dir

    data = data_path("counterfact.jsonl.gz")
    cuda = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "versions": {
            "nmke": nmke.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "cuda": cuda,
        "cache": str(cache_dir()),
        "data": None if data is None else str(data.parent),
        "builtin_models": {name: m.folder.is_dir() for name, m in BUILTIN_MODELS.items()},
        **_choices(),
    }


def examine(model: EditableModel, config: EditConfig) -> dict[str, Any]:
    """Everything about a model that editing it with these resolved settings depends on."""
    from nmke.editors.pipeline import target_site

    layers = config.layers or ()
    return {
        "model": model.source,
        "editable": True,
        **_structure(model, layers[0]),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "method": config.method,
        "layers": list(layers),
        "targets": "spread" if target_site(model, config, layers) == "block" else "joint",
        **_costs(model, config, layers),
        "corpus": {"source": config.corpus, "tokens": config.corpus_tokens},
        **_choices(),
    }


def _structure(model: EditableModel, layer: int) -> dict[str, Any]:
    layout = model.layout
    vocabulary = model.model.get_output_embeddings().weight.shape[0]
    return {
        "layout": {
            "n_layers": layout.n_layers,
            "d_model": layout.d_model,
            "d_mlp": layout.layers[layer].d_mlp,
            "d_vocab": int(vocabulary),
            "down_projection": layout.layers[layer].down_proj_name,
            "context_length": model.context_length,
        },
        "tokenizer": {
            "adds_bos": model.encoder.adds_bos,
            "padding_side": model.tokenizer.padding_side,
            "chat_template": bool(getattr(model.tokenizer, "chat_template", None)),
        },
    }


def _costs(model: EditableModel, config: EditConfig, layers: Sequence[int]) -> dict[str, Any]:
    """Memory and time, and the statistics that the method needs."""
    from nmke.cli import estimates
    from nmke.preparing import lacking, needed
    from nmke.stats.store import StatsStore

    found = needed(model, config, StatsStore())
    speed = estimates.tokens_per_second(model)
    prepare = estimates.prepare_cost(model, found, config, speed)
    edit = estimates.edit_cost(model, layers, config, speed)
    return {
        "memory_mb": {"model": estimates.model_mb(model), "editor": edit.memory_mb},
        "estimates": {
            "tokens_per_second": speed,
            "prepare_seconds": prepare.seconds,
            "prepare_disk_mb": prepare.disk_mb,
            "edit_seconds": edit.seconds,
        },
        "statistics": {one.name: {"missing": list(one.missing)} for one in found},
        "statistics_missing": lacking(found),
    }


def _choices() -> dict[str, Any]:
    from typing import get_args

    from nmke.attribution import neuron_scores
    from nmke.config import MaskName
    from nmke.editors import methods

    return {
        "methods": {entry.name: entry.summary for entry in methods},
        "masks": list(get_args(MaskName)),
        "attributions": list(neuron_scores.names()),
    }


def _print_installation(found: dict[str, Any]) -> None:
    fact("versions", ", ".join(f"{name} {version}" for name, version in found["versions"].items()))
    fact("machine", f"{found['platform']}, {found['threads']} threads")
    fact("devices", ", ".join(found["cuda"]) or "cpu (no CUDA device found)")
    fact("cache", f"{found['cache']}   (NMKE_CACHE changes it)")
    fact("data", found["data"] or "no folder of data sets found (NMKE_DATA names one); not needed to edit")
    models = [f"{name} ({'cached' if here else 'fetched when used'})" for name, here in _items(found)]
    fact("built-in", ", ".join(models))
    _print_choices(found)
    fact("next", "nmke doctor smollm2-135m")


def _items(found: dict[str, Any]) -> list[tuple[str, bool]]:
    return list(found["builtin_models"].items())


def _print_model(found: dict[str, Any]) -> None:
    from nmke.cli.estimates import duration

    layout, tokens, memory, cost = (found[k] for k in ("layout", "tokenizer", "memory_mb", "estimates"))
    fact("model", f"{found['model']} can be edited")
    fact(
        "layout",
        f"{layout['n_layers']} layers, d_model {layout['d_model']}, d_mlp {layout['d_mlp']}, "
        f"vocabulary {layout['d_vocab']}, reads {layout['context_length']} tokens\n"
        f"edits go to {layout['down_projection']} and its like",
    )
    fact(
        "tokens",
        f"{'adds' if tokens['adds_bos'] else 'adds no'} BOS, pads {tokens['padding_side']}, "
        f"{'has a' if tokens['chat_template'] else 'no'} chat template",
    )
    fact(
        "layers",
        f"{', '.join(map(str, found['layers']))} of {found['layout']['n_layers']}; targets {found['targets']}",
    )
    fact("weights", f"{found['dtype']} on {found['device']}")
    fact("memory", f"model {memory['model']:.0f} MB, editor about {memory['editor']:.0f} MB (estimate)")
    fact("prepare", statistics_text(found))
    fact(
        "speed",
        f"reads {cost['tokens_per_second']:.0f} tokens/s now; about {duration(cost['edit_seconds'])} per edit "
        "(estimate)",
    )
    _print_choices(found)
    say("try it:", "bold")
    say(f'  nmke edit {found["model"]} -p "The capital of {{France}} is" -t Lyon -o my-edits')


def statistics_text(found: Mapping[str, Any]) -> str:
    """Which of the statistics that the method needs are cached, and what gathering the others costs."""
    from nmke.cli.estimates import duration

    parts = []
    for name, one in found["statistics"].items():
        layers = ", ".join(map(str, one["missing"]))
        parts.append(f"{name} of layers {layers} are not cached" if layers else f"{name} are cached")
    if not parts:
        return f"method {found['method']!r} needs no statistics"
    corpus, cost = found["corpus"], found["estimates"]
    read = f"corpus {corpus['source']!r}, {corpus['tokens']} tokens"
    text = f"for method {found['method']!r}: {'; '.join(parts)} ({read})"
    if found["statistics_missing"]:
        seconds, size = duration(cost["prepare_seconds"]), cost["prepare_disk_mb"]
        text += f": about {seconds}, {size:.0f} MB on disk (estimate)"
    return text


def _print_choices(found: dict[str, Any]) -> None:
    from nmke.config import EditConfig

    default = EditConfig.create().method
    named = {
        f"{name} (default)" if name == default else name: line for name, line in found["methods"].items()
    }
    fact("methods", "\n".join(f"{name}: {summary}" for name, summary in named.items()))
    fact("masks", ", ".join(found["masks"]))
    fact("neurons", f"scored by {', '.join(found['attributions'])} (--attribution)")
