"""The config of a method by its name on a command line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loca_vision.methods.adapter_config import AdapterConfig
from loca_vision.methods.fourierft import FourierFTConfig
from loca_vision.methods.loca import LoCAConfig
from loca_vision.methods.lora import LoRAConfig
from loca_vision.methods.sdctft import SDCTFTConfig
from loca_vision.methods.selora import SeLoRAConfig

NAMES = {"loca": "LoCA", "sdctft": "sDCTFT", "fourierft": "FourierFT", "lora": "LoRA", "selora": "SeLoRA"}
"""As they are written in sentences."""
_SPARSE = ("n_components", "scale", "targets", "seed")
_LOW_RANK = ("r", "alpha", "use_dora", "targets", "seed")
_METHODS: dict[str, tuple[type[AdapterConfig], tuple[str, ...]]] = {
    "loca": (LoCAConfig, (*_SPARSE, "location_gradient")),
    "sdctft": (SDCTFTConfig, _SPARSE),
    "fourierft": (FourierFTConfig, _SPARSE),
    "lora": (LoRAConfig, _LOW_RANK),
    "selora": (SeLoRAConfig, (*_LOW_RANK, "eta", "basis")),
}


def config_of(method: str, settings: Mapping[str, Any]) -> AdapterConfig | None:
    """The config of a method, of those settings that it has; None for a method without an adapter.

    Raises:
        ValueError: a setting out of its range.
    """
    if method not in _METHODS:
        return None
    config, names = _METHODS[method]
    return config(**{name: settings[name] for name in names})
