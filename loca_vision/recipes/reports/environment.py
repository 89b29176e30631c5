"""Versions and hardware behind a result."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from loca_vision.version import __version__

_LIBRARIES = ("timm", "diffusers", "transformers", "accelerate")


def environment() -> dict[str, Any]:
    """Return versions (None if not installed), threads and device, for a record in JSON."""
    return {
        "loca_vision": __version__,
        "torch": torch.__version__,
        **{name: _version(name) for name in _LIBRARIES},
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None
