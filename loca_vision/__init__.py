"""Location-aware Cosine Adaptation (LoCA, ICLR 2025) for vision models: a plugin for timm and diffusers."""

from loca_vision.config import LoCAConfig
from loca_vision.inject import active_adapters, adapters, inject, remove, set_adapters
from loca_vision.schedule import AlternatingSchedule, parameter_groups
from loca_vision.spectrum import Spectrum

__version__ = "0.1.0"
__all__ = [
    "AlternatingSchedule",
    "LoCAConfig",
    "Spectrum",
    "active_adapters",
    "adapters",
    "inject",
    "parameter_groups",
    "remove",
    "set_adapters",
]
