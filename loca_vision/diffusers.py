"""LoCA for diffusers: importing this module adds the methods of `LoCALoaderMixin` to every pipeline.

For people who want nothing patched there are functions of the same names that take the pipeline first, after `unregister()`.
"""

from __future__ import annotations

from diffusers import DiffusionPipeline

from loca_vision.pipeline.attn_processor import LoCAAttnProcessor
from loca_vision.pipeline.loader import METHODS, PROPERTIES, LoCALoaderMixin

load_loca_weights = LoCALoaderMixin.load_loca_weights
save_loca_weights = LoCALoaderMixin.save_loca_weights
unload_loca_weights = LoCALoaderMixin.unload_loca_weights
delete_loca_adapters = LoCALoaderMixin.delete_loca_adapters
set_loca_adapters = LoCALoaderMixin.set_loca_adapters
get_active_loca_adapters = LoCALoaderMixin.get_active_loca_adapters
get_loca_adapters = LoCALoaderMixin.get_loca_adapters
disable_loca = LoCALoaderMixin.disable_loca
enable_loca = LoCALoaderMixin.enable_loca
set_loca_device = LoCALoaderMixin.set_loca_device
fuse_loca = LoCALoaderMixin.fuse_loca
unfuse_loca = LoCALoaderMixin.unfuse_loca
enable_loca_hotswap = LoCALoaderMixin.enable_loca_hotswap
enable_loca_low_memory = LoCALoaderMixin.enable_loca_low_memory

__all__ = ["LoCAAttnProcessor", "LoCALoaderMixin", "register", "unregister", *METHODS]


def register() -> None:
    """Add the methods to `diffusers.DiffusionPipeline`; a second time nothing happens."""
    for name in (*METHODS, *PROPERTIES):
        setattr(DiffusionPipeline, name, vars(LoCALoaderMixin)[name])


def unregister() -> None:
    """Take them away again; what is loaded stays loaded, and the functions of this module go on working."""
    for name in (*METHODS, *PROPERTIES):
        if vars(DiffusionPipeline).get(name) is vars(LoCALoaderMixin)[name]:
            delattr(DiffusionPipeline, name)


register()
