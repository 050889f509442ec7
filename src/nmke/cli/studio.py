"""`nmke studio`: edit, compare and undo in the browser, and an HTTP API, on this machine only unless told otherwise."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nmke.cli import options
from nmke.cli.console import fact, working
from nmke.cli.opening import Loading, editing, find_place
from nmke.cli.settings import merge, takes_settings
from nmke.errors import ConfigError, RequestError

if TYPE_CHECKING:
    from nmke.session import EditSession
    from nmke.studio.security import Access

DEFAULT_MODEL = "smollm2-135m"
CLOSING_SECONDS = 5  # what open streams get to end


@takes_settings()
def studio(
    source: Annotated[
        str,
        typer.Argument(metavar="[RUN|MODEL]", help="Run to go on with, or model to begin one on."),
    ] = DEFAULT_MODEL,
    port: Annotated[int, typer.Option("--port", min=1, max=65_535, help="Where to listen.")] = 7860,
    host: Annotated[
        str, typer.Option("--host", help="Address to listen on; others than this machine's need --token.")
    ] = "127.0.0.1",
    token: Annotated[
        str | None,
        typer.Option(
            "--token", help="What every request must know; 16 characters or more.", envvar="NMKE_TOKEN"
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Run folder to make or go on with.")
    ] = None,
    config: options.Config = None,
    dtype: options.Dtype = "float32",
    device: options.Device = "auto",
    revision: options.Revision = None,
    settings: dict[str, Any] = {},  # noqa: B006 - filled by takes_settings, never changed
) -> None:
    """Open the studio: http://127.0.0.1:7860 and an HTTP API beside it (/docs). Ctrl-C saves and ends it."""
    _check_installed()
    from nmke.studio.security import Access

    access = Access(host, port, token)
    _check_free(access)
    resume = output is not None and (output / "nmke.json").is_file()
    place = find_place(source, output, resume=resume, force=False)
    given = merge(settings, config, place.recipe)
    with editing(place, given, Loading(dtype, device, revision), []) as session:
        if given and place.model is not None:
            session.folder.write_recipe(given)
        _serve(session, access)


def _check_installed() -> None:
    import importlib.util

    missing = [name for name in ("gradio", "fastapi", "uvicorn") if importlib.util.find_spec(name) is None]
    if missing:
        raise RequestError(
            f"the studio needs {', '.join(missing)}, not installed here; install with: pip install 'nmke[studio]'"
        )


def _check_free(access: Access) -> None:
    """Raise unless the port can be listened on; known before a model is loaded."""
    import socket

    family = socket.AF_INET6 if ":" in access.host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((access.host, access.port))
        except OSError as error:
            raise ConfigError(
                f"{access.host}:{access.port} cannot be listened on ({error.strerror}); choose another --port"
            ) from error


def _serve(session: EditSession, access: Access) -> None:
    import uvicorn

    with working("starting the studio"):
        from nmke.studio.app import make_app
        from nmke.studio.service import Studio

        opened = Studio(session)
        app = make_app(opened, access)
    fact("studio", access.url)
    fact("run", str(session.folder.root))
    fact("stop", "Ctrl-C: what was written is saved, unfinished jobs go on at the next start")
    try:
        uvicorn.run(
            app,
            host=access.host,
            port=access.port,
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=CLOSING_SECONDS,
        )
    finally:
        opened.close()
