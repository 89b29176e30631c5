"""The lower part of every page: the description of an adapter's file, and its spectra, drawn when they are first shown."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path

import gradio as gr

from loca_vision.commands.app.about import about_file, picture_of

_NO_PICTURE = "No update in the file has a spectrum without the weight it is added to."


def about_tabs(source: Path, scratch: Path, of: str = "") -> None:
    """Add two tabs to the surrounding `gr.Tabs`.

    Args:
        source: the adapter's file or folder.
        scratch: a folder for the picture.
        of: the adapter's name, if the page has several.
    """

    @cache  # drawn once, when first shown
    def spectra() -> str | None:
        picture = Path(tempfile.mkdtemp(dir=scratch)) / "spectra.png"
        return str(picture) if picture_of(source, picture) else None

    suffix = f" of {of}" if of else ""
    with gr.Tab(f"What the file{suffix} says"):
        gr.HTML(about_file(source))
    with gr.Tab(f"Spectra{suffix}") as tab:
        image = gr.Image(
            label="Spectra", show_label=False, alt_text="The cosine spectrum of each projection's update", format="png",
            buttons=["fullscreen", "download"], interactive=False, placeholder=_NO_PICTURE,
        )  # fmt: skip
    tab.select(spectra, None, image, api_visibility="private")
