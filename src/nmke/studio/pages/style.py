"""Looks of the pages: system fonts, one accent, readable on 400 pixels, in light and in dark."""

from __future__ import annotations

from importlib import resources
from typing import Any


def theme() -> Any:
    """A theme that asks no other host for fonts."""
    import gradio as gr

    return gr.themes.Base(
        primary_hue="indigo",
        secondary_hue="indigo",
        neutral_hue="slate",
        font=["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"],
        font_mono=["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace"],
    ).set(
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_primary_background_fill_dark="*primary_500",
        button_primary_text_color="white",
        body_background_fill="*neutral_50",
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
        block_label_text_color="*neutral_700",
        block_label_text_color_dark="*neutral_200",
        block_title_text_color="*neutral_800",
        block_title_text_color_dark="*neutral_100",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_300",
    )


def css() -> str:
    """The style sheet."""
    return (resources.files("nmke.studio") / "templates" / "studio.css").read_text(encoding="utf-8")
