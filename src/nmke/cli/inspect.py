"""`nmke inspect`: the neurons that one edit used, layer by layer, and what they said before and after."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nmke.cli import options
from nmke.cli.console import fact, print_json, say, table
from nmke.cli.history import find_edit, read_history
from nmke.cli.opening import open_run, run_folder
from nmke.errors import RequestError

if TYPE_CHECKING:
    from nmke.events import EditRecord, Event
    from nmke.models.load import EditableModel
    from nmke.neurons.edit_use import LayerUse, UsedNeuron

Words = list[dict[str, Any]]


def inspect(
    run: options.Run,
    edit_id: options.EditId,
    count: Annotated[int, typer.Option("-n", "--neurons", min=1, help="Neurons per layer to describe.")] = 3,
    as_json: options.Json = False,
    device: options.Device = "auto",
) -> None:
    """Show which neurons an edit used, how much of it each carries, what they said before and after."""
    from nmke.batch_file import read_writes
    from nmke.neurons.edit_use import edit_use

    root = run_folder(run)
    _, events, active = read_history(run)
    event, record = find_edit(events, edit_id)
    number = written_number(event, record)
    found = edit_use(read_writes(batch_path(root, event)), number, count)
    with closing(open_run(root, device)) as session:
        layers = describe(session.model, found)
    content = {
        "schema": "nmke.inspect/1",
        "run": run,
        "id": record.request.id,
        "batch": event.id,
        "active": event.seq in active,
        "prompt": record.request.text,
        "subject": record.request.subject,
        "target_new": record.request.target_new,
        "detail": record.detail,
        "masks": event.body.get("masks", {}),
        "scores": event.body.get("scores", {}),
        "layers": layers,
    }
    if as_json:
        print_json(content)
    else:
        _show(content)


def written_number(event: Event, record: EditRecord) -> int:
    """The edit's place among those that its batch wrote.

    Raises:
        RequestError: If it was known already, so that nothing was written.
    """
    if record.status == "known":
        raise RequestError(
            f"edit {record.request.id!r} was known already: nothing was written, so it used no neurons"
        )
    written = [other for other in event.edits if other.status != "known"]
    return written.index(record)


def batch_path(root: Path, event: Event) -> Path:
    """The file of a batch."""
    name = next(name for name in event.files if name.startswith("edits/"))
    return root / name


def describe(model: EditableModel, uses: Sequence[LayerUse]) -> list[dict[str, Any]]:
    """The uses as JSON, each neuron with the tokens it promoted before and promotes after."""
    import torch

    from nmke.neurons.words import PromotedTokens, promoted_tokens

    neurons = [neuron for use in uses for neuron in use.top]
    if not neurons:
        return [_layer(use, []) for use in uses]
    columns = torch.stack([column for neuron in neurons for column in (neuron.before, neuron.after)])
    words = promoted_tokens(model, columns.to(model.device))

    def said(tokens: PromotedTokens, coefficient: float) -> Words:
        pairs = tokens.positive if coefficient >= 0 else tokens.negative
        return [{"token": token, "logit": logit} for token, logit in pairs]

    described = [
        _neuron(neuron, said(words[2 * i], neuron.coefficient), said(words[2 * i + 1], neuron.coefficient))
        for i, neuron in enumerate(neurons)
    ]
    return [_layer(use, [one for one in described if one["layer"] == use.layer]) for use in uses]


def _layer(use: LayerUse, neurons: Words) -> dict[str, Any]:
    return {
        "layer": use.layer,
        "d_mlp": use.d_mlp,
        "allowed": use.allowed,
        "for_half": use.for_half,
        "for_most": use.for_most,
        "written": use.written,
        "share_of_batch": use.share,
        "neurons": neurons,
    }


def _neuron(neuron: UsedNeuron, before: Words, after: Words) -> dict[str, Any]:
    return {
        "layer": neuron.layer,
        "neuron": neuron.neuron,
        "carries": neuron.carries,
        "coefficient": neuron.coefficient,
        "change": neuron.change,
        "cosine": neuron.cosine,
        "before": before,
        "after": after,
    }


def _show(content: dict[str, Any]) -> None:
    fact("edit", f"{content['id']} in batch {content['batch']}{'' if content['active'] else ' (taken back)'}")
    fact("fact", f"{content['prompt']} → {content['target_new']}")
    detail = content["detail"]
    fact("p(new)", f"{detail['probability_before']:.3g} → {detail['probability_after']:.3g}")
    say()
    table(
        ("layer", "may change", "of", "carry half", "carry 90 %", "written", "of the batch"),
        [
            (
                str(layer["layer"]),
                str(layer["allowed"]),
                str(layer["d_mlp"]),
                str(layer["for_half"]),
                str(layer["for_most"]),
                f"{layer['written']:.2f}",
                f"{layer['share_of_batch']:.0%}",
            )
            for layer in content["layers"]
        ],
        right=("may change", "of", "carry half", "carry 90 %", "written", "of the batch"),
    )
    for layer in content["layers"]:
        for one in layer["neurons"]:
            fact(
                f"{one['layer']}.{one['neuron']}",
                f"carries {one['carries']:.1%}; coefficient {one['coefficient']:+.2f}; column changed by "
                f"{one['change']:.1%}, cosine {one['cosine']:.3f}",
            )
            fact("", f"before {_listed(one['before'])}")
            fact("", f"after  {_listed(one['after'])}")


def _listed(tokens: Words) -> str:
    return " ".join(repr(one["token"]) for one in tokens)
