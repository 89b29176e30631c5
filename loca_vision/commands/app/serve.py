"""Serve a gradio page: only on this machine by default, without telemetry, and without requests to any other host."""

from __future__ import annotations

import signal
import socket
import sys
import tempfile
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from loca_vision.commands.app.command import App, name_of, names_of
from loca_vision.commands.app.uploads import MOST_BYTES, MOST_PIXELS

_CSS = Path(__file__).with_name("page.css")
_KEPT = 3600  # seconds that gradio keeps its files, and also the interval at which it checks their age


def check_address(host: str, port: int) -> None:
    """Check that the page can be served at an address.

    Raises:
        ValueError: this machine has no such address, or the port is in use or not allowed.
    """
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (socket.gaierror, UnicodeError):
        raise ValueError(f"host={host!r}: there is no such address") from None
    with socket.socket(family, socket.SOCK_STREAM) as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # ignore a server that has just ended
        try:
            one.bind(address)
        except OSError as error:
            raise ValueError(
                f"{host}:{port}: the page cannot be served there ({error.strerror}); choose another --port"
            ) from None


def serve(settings: App) -> None:
    """Build the page, and serve it until it is interrupted."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # like Ctrl+C, so that the folder below is removed
    Image.MAX_IMAGE_PIXELS = MOST_PIXELS  # for what gradio decodes itself, such as drawings
    with tempfile.TemporaryDirectory(prefix="loca-app-") as scratch:
        page = page_of(settings, Path(scratch))
        start(page, settings)
        print(
            f"http://{_in_url(settings.host)}:{settings.port} shows {' and '.join(settings.adapters)}; Ctrl+C stops it",
            flush=True,
        )
        page.block_thread()


def page_of(settings: App, scratch: Path) -> gr.Blocks:
    """Build the whole page.

    Args:
        scratch: a folder for the page's own files, which lasts as long as the page.

    Raises:
        FileNotFoundError, ValueError, OSError: something cannot be loaded.
    """
    inside, subtitle = _pipeline(settings, scratch) if settings.pipeline else _classifier(settings, scratch)
    title = ", ".join(name_of(adapter) for adapter in settings.adapters)
    with gr.Blocks(title=f"{title} - loca-vision", analytics_enabled=False, delete_cache=(_KEPT, _KEPT)) as page:
        gr.Markdown(f"# {_plain(title)}\n{_plain(subtitle)}", elem_id="title")
        inside.build()
    return page


def start(page: gr.Blocks, settings: App) -> None:
    """Serve the page in background threads, and return."""
    page.queue(default_concurrency_limit=1, api_open=False).launch(
        server_name=_in_url(settings.host), server_port=settings.port, inbrowser=settings.open, share=False, quiet=True,
        prevent_thread_lock=True, show_error=True, ssr_mode=False, mcp_server=False, enable_monitoring=False, run_history=False,
        max_file_size=MOST_BYTES, footer_links=[], css_paths=[_CSS], theme=_theme(),
    )  # fmt: skip


def _in_url(host: str) -> str:
    """Return the host as written in a URL: an IPv6 address in brackets."""
    return f"[{host}]" if ":" in host else host


def _theme() -> Any:
    """Return a theme with fonts of the visitor's system, so that none is downloaded."""
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    return gr.themes.Default(primary_hue="blue", neutral_hue="slate", **fonts)


def _classifier(settings: App, scratch: Path) -> tuple[Any, str]:
    from loca_vision.commands.app.classifier import read_classifier
    from loca_vision.commands.app.classifier_page import ClassifierPage
    from loca_vision.recipes.classification.predict import Predict

    asked = Predict(
        settings.adapters[0], (), classes=settings.classes, model=settings.model, image_size=settings.image_size,
        weights=settings.weights, imports=settings.imports,
    )  # fmt: skip
    trained = read_classifier(asked)
    return ClassifierPage(trained, scratch), trained.summary


def _pipeline(settings: App, scratch: Path) -> tuple[Any, str]:
    from loca_vision.commands.app.generator import read_generator
    from loca_vision.commands.app.generator_page import GeneratorPage

    assert settings.pipeline is not None
    generator = read_generator(settings.pipeline, names_of(settings.adapters), scratch)
    return GeneratorPage(generator, scratch), generator.summary


def _plain(text: str) -> str:
    """Escape what has a meaning in Markdown or HTML, since file names are untrusted."""
    return "".join(f"&#{ord(letter)};" if letter in "<>&`*_[]()#\\!|~$" else letter for letter in text)
