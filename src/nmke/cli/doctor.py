"""`nmke doctor`: can this be edited, where, at what cost; without a model, what is installed."""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nmke.cli import options
from nmke.cli.console import fact, print_json, say, working
from nmke.cli.opening import Loading, load

if TYPE_CHECKING:
    from nmke.models.load import EditableModel


def doctor(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="Model to look at; none: this installation itself.")
    ] = None,
    as_json: options.Json = False,
    dtype: options.Dtype = "float32",
    device: options.Device = "auto",
    revision: options.Revision = None,
) -> None:
    """Say whether a model can be edited: layers, type, memory, time, what is cached. Changes nothing."""
    if model is None:
        found = installation()
    else:
        loaded = load(model, Loading(dtype, device, revision))
        with working("measuring speed"):
            found = examine(loaded)
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


def examine(model: EditableModel) -> dict[str, Any]:
    """Everything about a model that editing depends on."""
    from nmke.cli import estimates
    from nmke.config import EditConfig
    from nmke.editors.pipeline import target_site
    from nmke.session import resolve
    from nmke.stats.store import CorpusSpec, StatsStore

    config = resolve(EditConfig.create(), model)
    layers = config.layers or ()
    layout = model.layout
    spec = CorpusSpec(config.corpus, config.corpus_tokens, config.seed)
    missing = StatsStore().missing(model, layers, spec)
    speed = estimates.tokens_per_second(model)
    prepare = estimates.prepare_cost(model, missing, config, speed)
    edit = estimates.edit_cost(model, layers, config, speed)
    vocabulary = model.model.get_output_embeddings().weight.shape[0]
    return {
        "model": model.source,
        "editable": True,
        "layout": {
            "n_layers": layout.n_layers,
            "d_model": layout.d_model,
            "d_mlp": layout.layers[layers[0]].d_mlp,
            "d_vocab": int(vocabulary),
            "down_projection": layout.layers[layers[0]].down_proj_name,
            "context_length": model.context_length,
        },
        "tokenizer": {
            "adds_bos": model.encoder.adds_bos,
            "padding_side": model.tokenizer.padding_side,
            "chat_template": bool(getattr(model.tokenizer, "chat_template", None)),
        },
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "layers": list(layers),
        "targets": "spread" if target_site(model, config, layers) == "block" else "joint",
        "memory_mb": {"model": estimates.model_mb(model), "editor": edit.memory_mb},
        "estimates": {
            "tokens_per_second": speed,
            "prepare_seconds": prepare.seconds,
            "prepare_disk_mb": prepare.disk_mb,
            "edit_seconds": edit.seconds,
        },
        "statistics_missing": missing,
        "corpus": {"source": config.corpus, "tokens": config.corpus_tokens},
        **_choices(),
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
    fact("layers", f"{', '.join(map(str, found['layers']))} by relative depth; targets {found['targets']}")
    fact("weights", f"{found['dtype']} on {found['device']}")
    fact("memory", f"model {memory['model']:.0f} MB, editor about {memory['editor']:.0f} MB (estimate)")
    corpus = f"{found['corpus']['source']!r}, {found['corpus']['tokens']} tokens"
    if found["statistics_missing"]:
        fact(
            "prepare",
            f"key statistics of layers {', '.join(map(str, found['statistics_missing']))} are not cached "
            f"(corpus {corpus}): about {duration(cost['prepare_seconds'])}, "
            f"{cost['prepare_disk_mb']:.0f} MB on disk (estimate)",
        )
    else:
        fact("prepare", f"key statistics are cached (corpus {corpus})")
    fact(
        "speed",
        f"reads {cost['tokens_per_second']:.0f} tokens/s now; about {duration(cost['edit_seconds'])} per edit "
        "(estimate)",
    )
    _print_choices(found)
    say("try it:", "bold")
    say(f'  nmke edit {found["model"]} -p "The capital of {{France}} is" -t Lyon -o my-edits')


def _print_choices(found: dict[str, Any]) -> None:
    fact("methods", "\n".join(f"{name}: {summary}" for name, summary in found["methods"].items()))
    fact("masks", ", ".join(found["masks"]))
    fact("neurons", f"scored by {', '.join(found['attributions'])} (--attribution)")
