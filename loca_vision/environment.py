"""On what a result was obtained."""

from __future__ import annotations

import platform
from typing import Any

import timm
import torch

from loca_vision.version import __version__


def environment() -> dict[str, Any]:
    """Versions, threads and device, for a record in JSON."""
    return {
        "loca_vision": __version__,
        "torch": torch.__version__,
        "timm": timm.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
