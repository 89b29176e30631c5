"""Location-aware Cosine Adaptation (LoCA, ICLR 2025) for vision models, and its family: a plugin for timm and diffusers."""

from loca_vision.checkpoint import load_adapter, save_adapter
from loca_vision.explanation import explain
from loca_vision.fourierft import FourierFTConfig
from loca_vision.inject import active_adapters, adapters, inject, remove, set_adapters
from loca_vision.kinds import KINDS, AdapterConfig, Projection, kind
from loca_vision.loca import LoCAConfig
from loca_vision.low_rank import LoRAConfig
from loca_vision.schedule import AlternatingSchedule, parameter_groups
from loca_vision.sdctft import SDCTFTConfig
from loca_vision.selora import SeLoRAConfig
from loca_vision.spectrum import Spectrum
from loca_vision.update import Update
from loca_vision.version import __version__

__all__ = [
    "KINDS",
    "AdapterConfig",
    "AlternatingSchedule",
    "FourierFTConfig",
    "LoCAConfig",
    "LoRAConfig",
    "Projection",
    "SDCTFTConfig",
    "SeLoRAConfig",
    "Spectrum",
    "Update",
    "__version__",
    "active_adapters",
    "adapters",
    "explain",
    "inject",
    "kind",
    "load_adapter",
    "parameter_groups",
    "remove",
    "save_adapter",
    "set_adapters",
]
