"""The page: the strip of what is going on, and the tabs under it; mounted behind the application's guard."""

from __future__ import annotations

import os
from typing import Any

from nmke.studio.security import Access
from nmke.studio.service import FOLDER, Studio

CACHE_SECONDS = (3600, 24 * 3600)  # how often uploads are looked through, and how old they may get


def mount(app: Any, studio: Studio, access: Access) -> None:
    """Serve the studio's page at the root of an application, after every other route."""
    # Gradio reads both at import and whenever it stores an upload: nothing leaves the machine or the run folder.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["GRADIO_TEMP_DIR"] = str(studio.root / FOLDER / "uploads")
    import gradio as gr

    from nmke.studio.pages import style

    gr.mount_gradio_app(
        app,
        build(studio),
        path="/",
        server_name=access.host,
        server_port=access.port,
        theme=style.theme(),
        css=style.css(),
        footer_links=[],
        run_history=False,
        show_error=False,
        max_file_size=studio.limits.upload_bytes,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        enable_monitoring=False,
    )


def build(studio: Studio) -> Any:
    """The page itself."""
    import gradio as gr

    from nmke.studio.pages import activity, compare, edit, exporting, history, importing, model, neurons
    from nmke.studio.pages.common import html

    with gr.Blocks(analytics_enabled=False, title="nmke studio", delete_cache=CACHE_SECONDS) as page:
        gr.HTML(html("head.html", model=studio.session.model.name, run=studio.root.name))
        activity.build(studio)
        with gr.Tabs():
            with gr.Tab("Edit"):
                edit.build(studio)
            with gr.Tab("Compare"):
                compare.build(studio)
            with gr.Tab("History") as tab:
                history.build(studio, tab)
            with gr.Tab("Neurons") as tab:
                neurons.build(studio, tab)
            with gr.Tab("Import"):
                importing.build(studio)
            with gr.Tab("Export"):
                exporting.build(studio)
            with gr.Tab("Models"):
                model.build(studio)
    page.queue(api_open=False, default_concurrency_limit=None)
    return page
