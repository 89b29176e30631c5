"""LoCA for diffusers: importing this module adds the methods of `LoCALoaderMixin` to every pipeline.

From the first adapter in a model on, `__call__` and `encode_prompt` of all pipeline classes are wrapped as well, so that text
encoders hear the scale of a call. For people who want nothing patched there are functions of the same names that take the
pipeline first, after `unregister()`.
"""

from __future__ import annotations

from typing import Any

import diffusers
from diffusers import DiffusionPipeline

from loca_vision.layers.pipeline_call import listen, stop_listening
from loca_vision.pipeline.attn_processor import LoCAAttnProcessor
from loca_vision.pipeline.call_entry import tell_no_scale, tell_scale, with_subclasses
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


_ROOTS: tuple[Any, ...] = (DiffusionPipeline, *([diffusers.ModularPipeline] if hasattr(diffusers, "ModularPipeline") else []))


def register() -> None:
    """Add the methods to `diffusers.DiffusionPipeline` and `ModularPipeline`; a second time nothing happens."""
    for root in _ROOTS:
        for name in (*METHODS, *PROPERTIES):
            setattr(root, name, vars(LoCALoaderMixin)[name])
    listen(_tell_scales)


def unregister() -> None:
    """Take them away again, and unwrap what was wrapped; what is loaded stays loaded, and the functions go on working.

    Text encoders then hear the scale of a call in classes that take `LoCALoaderMixin`, and in the class of a pipeline for whose
    text encoder an adapter is loaded afterwards. Elsewhere they act at the weights that were set.
    """
    stop_listening(_tell_scales)
    for root in _ROOTS:
        for name in (*METHODS, *PROPERTIES):
            if vars(root).get(name) is vars(LoCALoaderMixin)[name]:
                delattr(root, name)
        if vars(root).get("__init_subclass__") is _tell_of_new_class:
            del root.__init_subclass__
        for cls in with_subclasses(root):
            if not issubclass(cls, LoCALoaderMixin):
                tell_no_scale(cls)


def _tell_scales() -> None:
    """Wrap all pipeline classes: those that are there, and those that will be imported."""
    for root in _ROOTS:
        for cls in with_subclasses(root):
            tell_scale(cls)
        if "__init_subclass__" not in vars(root):
            root.__init_subclass__ = _tell_of_new_class


@classmethod  # type: ignore[misc]
def _tell_of_new_class(cls: type, **named: Any) -> None:
    root = next(root for root in _ROOTS if issubclass(cls, root))
    super(root, cls).__init_subclass__(**named)
    tell_scale(cls)


register()
