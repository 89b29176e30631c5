"""Location-aware Cosine Adaptation (LoCA, ICLR 2025) for vision models: a plugin for timm and diffusers."""

from loca_vision.checkpoint import load_adapter, save_adapter
from loca_vision.config import LoCAConfig
from loca_vision.inject import active_adapters, adapters, inject, remove, set_adapters
from loca_vision.schedule import AlternatingSchedule, parameter_groups
from loca_vision.spectrum import Spectrum
from loca_vision.version import __version__

__all__ = [
    "AlternatingSchedule",
    "LoCAConfig",
    "Spectrum",
    "__version__",
    "active_adapters",
    "adapters",
    "inject",
    "load_adapter",
    "parameter_groups",
    "remove",
    "save_adapter",
    "set_adapters",
]
