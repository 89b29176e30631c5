"""The number of bits in which a trainer saves each coefficient of the adapter."""

from __future__ import annotations

from typing import Literal

import torch

from loca_vision.formats.packed.reading import can_be_packed
from loca_vision.methods.adapter_config import AdapterConfig

AdapterDtype = Literal["float32", "float16", "int8"]


def check_adapter_dtype(name: AdapterDtype, config: AdapterConfig | None) -> None:
    """Raise `ValueError` if the method, before it is trained, is known to lack such a file format."""
    if name == "int8" and config is not None and not can_be_packed(config):
        raise ValueError(f"adapter_dtype='int8': {config.method} is stored in float32 or float16")


def dtype_of(name: AdapterDtype) -> torch.dtype:
    """Return the dtype for `save_adapter`."""
    found: torch.dtype = getattr(torch, name)
    return found
