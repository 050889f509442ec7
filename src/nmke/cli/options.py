"""Options that several verbs share, so that they are spelled and explained the same everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Source = Annotated[
    str,
    typer.Argument(metavar="SOURCE", help="Model (built-in name, folder, GGUF file, hub id) or run folder."),
]
Run = Annotated[str, typer.Argument(metavar="RUN", help="Run folder.")]
EditId = Annotated[str, typer.Argument(metavar="ID", help="Edit, or a unique beginning of its id.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Yes = Annotated[bool, typer.Option("-y", "--yes", help="Do not ask.")]
Config = Annotated[Path | None, typer.Option("-c", "--config", help="YAML file of settings.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Only the first N facts.")]
Dtype = Annotated[
    str, typer.Option(help="Type of the weights: float32, bfloat16, auto.", envvar="NMKE_DTYPE")
]
Device = Annotated[
    str,
    typer.Option(
        help="auto, cpu, cuda, cuda:1, or spread: the layers over all there are.", envvar="NMKE_DEVICE"
    ),
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")]
