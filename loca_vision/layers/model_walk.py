"""Walk over the layers of a model that may get an update, and determine whether their owners call them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from loca_vision.layers.attention_layouts import base_of


@dataclass(frozen=True)
class Place:
    """A module of a model.

    Args:
        path: the path of the module, including all wrappers.
        module: the module itself, without the wrapper that peft may have put around it.
        called: whether the code it belongs to calls its layers, as diffusers and transformers do, and never computes with
            their weights directly.
    """

    path: str
    module: nn.Module
    called: bool


def places(model: nn.Module) -> Iterator[Place]:
    """Yield every module once, in the order of `named_modules`, except modules that adapters of any kind put into layers."""
    yield from _below("", model, False, set())


def _below(path: str, module: nn.Module, called: bool, seen: set[int]) -> Iterator[Place]:
    layer = base_of(module) if hasattr(module, "get_base_layer") else module
    if id(layer) in seen:
        return
    seen.add(id(layer))
    if isinstance(layer, nn.MultiheadAttention):  # it reads the weight of its output layer
        called = False
    elif not type(layer).__module__.startswith("torch."):
        called = calls_its_layers(type(layer)) and type(layer).__name__ not in _READERS
    yield Place(path, layer, called)
    if layer is not module:
        return
    for name, child in module._modules.items():
        if child is not None and name != "loca":
            yield from _below(f"{path}.{name}" if path else name, child, called, seen)


# Classes of diffusers that compute with the weights of their layers instead of calling the layers.
_READERS = {"HunyuanDiTAttentionPool", "MiniMaxH3AudioCausalAttention", "_AceStepResidualFSQ"}


def calls_its_layers(cls: type) -> bool:
    """Whether the class is one of diffusers or transformers, or extends one."""
    known = _known.get(cls)
    if known is None:
        known = _known[cls] = any(one.__module__.split(".")[0] in ("diffusers", "transformers") for one in cls.__mro__)
    return known


_known: dict[type, bool] = {}
