"""Location-aware Cosine Adaptation (LoCA, ICLR 2025) and related methods for vision models: a plugin for timm and diffusers."""

from loca_vision.formats import beside_the_model as _beside_the_model  # noqa: F401  used by `save_pretrained`
from loca_vision.formats.file_updates import FileUpdates, read_updates
from loca_vision.formats.save_load import load_adapter, save_adapter
from loca_vision.methods.adapter_config import AdapterConfig, Projection
from loca_vision.methods.fourierft import FourierFTConfig
from loca_vision.methods.loca import LoCAConfig
from loca_vision.methods.lora import LoRAConfig
from loca_vision.methods.registry import KINDS, kind
from loca_vision.methods.sdctft import SDCTFTConfig
from loca_vision.methods.selora import SeLoRAConfig
from loca_vision.methods.shira import SHiRAConfig
from loca_vision.methods.spectrum import Spectrum
from loca_vision.methods.update import Update
from loca_vision.methods.waveft import WaveFTConfig
from loca_vision.model.adapters import (
    active_adapters,
    adapters,
    disable_adapter,
    print_trainable_parameters,
    rename_adapter,
    set_adapters,
)
from loca_vision.model.explain import explain
from loca_vision.model.inject import inject
from loca_vision.model.per_sample import head_logits, per_sample
from loca_vision.model.remove import remove
from loca_vision.model.schedule import AlternatingSchedule, parameter_groups
from loca_vision.model.select_locations import select_locations
from loca_vision.serving.adapter_store import AdapterStore
from loca_vision.version import __version__

__all__ = [
    "KINDS",
    "AdapterConfig",
    "AdapterStore",
    "AlternatingSchedule",
    "FileUpdates",
    "FourierFTConfig",
    "LoCAConfig",
    "LoRAConfig",
    "Projection",
    "SDCTFTConfig",
    "SHiRAConfig",
    "SeLoRAConfig",
    "Spectrum",
    "Update",
    "WaveFTConfig",
    "__version__",
    "active_adapters",
    "adapters",
    "disable_adapter",
    "explain",
    "head_logits",
    "inject",
    "kind",
    "load_adapter",
    "parameter_groups",
    "per_sample",
    "print_trainable_parameters",
    "read_updates",
    "remove",
    "rename_adapter",
    "save_adapter",
    "select_locations",
    "set_adapters",
]
