"""LoCA for diffusers: importing this module adds the methods of `LoCALoaderMixin` to every pipeline.

Once a model has its first adapter, two kinds of methods of diffusers' classes are wrapped as well: `__call__` and
`encode_prompt` of pipelines, so that text encoders use the scale of a call, and methods that copy a model's weights into
another, which would lose adapters. If you want nothing to be patched, call `unregister()` and use the functions of the same
names, which take the pipeline as their first argument.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
from diffusers import DiffusionPipeline, ModelMixin

from loca_vision.layers.pipeline_call import listen, stop_listening
from loca_vision.pipeline.attn_processor import LoCAAttnProcessor
from loca_vision.pipeline.call_entry import ENTRIES, tell_scale
from loca_vision.pipeline.class_wrapping import unwrap_methods, with_subclasses
from loca_vision.pipeline.copies_of_weights import CONSTRUCTORS, FREE_NOISE, refuse_adapted_blocks, refuse_adapted_models
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


_PIPELINES: tuple[Any, ...] = (
    DiffusionPipeline,
    *([diffusers.ModularPipeline] if hasattr(diffusers, "ModularPipeline") else []),
)
_WRAPPERS: dict[Any, tuple[Callable[[type], None], ...]] = {
    **dict.fromkeys(_PIPELINES, (tell_scale, refuse_adapted_blocks)),
    ModelMixin: (refuse_adapted_models,),
}


def register() -> None:
    """Add the methods to `diffusers.DiffusionPipeline` and `ModularPipeline`; a second call does nothing."""
    for root in _PIPELINES:
        for name in (*METHODS, *PROPERTIES):
            setattr(root, name, vars(LoCALoaderMixin)[name])
    listen(_wrap_all)


def unregister() -> None:
    """Remove the methods and unwrap what was wrapped; loaded adapters stay loaded, and the functions continue to work.

    After this, text encoders use the scale of a call only in classes that inherit from `LoCALoaderMixin`, and in the class of
    a pipeline into whose text encoder an adapter is loaded afterwards. In all others, they act at the weights that were set.
    """
    stop_listening(_wrap_all)
    for root in _PIPELINES:
        for name in (*METHODS, *PROPERTIES):
            if vars(root).get(name) is vars(LoCALoaderMixin)[name]:
                delattr(root, name)
    for root in _WRAPPERS:
        if vars(root).get("__init_subclass__") is _wrap_new:
            del root.__init_subclass__
        for cls in with_subclasses(root):
            if not issubclass(cls, LoCALoaderMixin):
                unwrap_methods(cls, (*ENTRIES, *FREE_NOISE, *CONSTRUCTORS))


def _wrap_all() -> None:
    """Wrap all existing classes, once, and those that are imported later."""
    for root in _WRAPPERS:
        there = vars(root).get("__init_subclass__")
        if there is _wrap_new:
            continue
        if there is None:  # if diffusers defines one itself, it stays
            root.__init_subclass__ = _wrap_new
        for cls in with_subclasses(root):
            _wrap(cls)


def _wrap(cls: type) -> None:
    for wrap in next(wrappers for root, wrappers in _WRAPPERS.items() if issubclass(cls, root)):
        wrap(cls)


@classmethod  # type: ignore[misc]
def _wrap_new(cls: type, **named: Any) -> None:
    root = next(root for root in _WRAPPERS if issubclass(cls, root))
    super(root, cls).__init_subclass__(**named)
    _wrap(cls)


register()
