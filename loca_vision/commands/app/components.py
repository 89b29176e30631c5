"""Parts of pages: uploads, which are checked before they are decoded, and sliders for strengths."""

from __future__ import annotations

from typing import Any

import gradio as gr
from PIL import Image

from loca_vision.commands.app.uploads import read_upload


def upload(label: str, **more: Any) -> Any:
    """Return an image input whose functions get upright RGB; if an upload is invalid, the page says what is wrong."""
    image = gr.Image(label=label, sources=["upload", "clipboard"], **more)
    image.preprocess = _read  # not a subclass, for which gradio would write a file of types next to this one
    return image


def _read(payload: Any) -> Image.Image | None:
    """Read the file of a request, which gradio has checked to be among the uploaded ones."""
    if payload is None:
        return None
    if not payload.path:
        raise gr.Error("Expected an uploaded image, got none.", print_exception=False)
    try:
        return read_upload(payload.path)
    except ValueError as error:
        raise gr.Error(str(error), print_exception=False) from None


def strength_slider(label: str, **more: Any) -> Any:
    """Return a slider from 0, where nothing is added to the weights, over 1, as trained, to 2."""
    return gr.Slider(0, 2, 1, step=0.05, label=label, **more)
