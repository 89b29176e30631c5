"""The size of the batch a model is called with, for calls that mix adapters."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from loca_vision.functional.transforms import compiled
from loca_vision.layers.mixed_call import operator, refuse_exports
from loca_vision.layers.mixtures import batch_of, handle_of, mixture_of, owner_of
from loca_vision.model.trial import try_once


def watch_batches(model: nn.Module) -> int:
    """Let calls of the model, and of a timm model's `forward_features`, say how large their batches are; returns its handle."""
    handle = handle_of(model)
    if _note not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(_note, with_kwargs=True)
    first = _first_layer(model) if hasattr(model, "forward_features") else None
    if first is not None and not any(_watches(hook, model) for hook in first._forward_pre_hooks.values()):
        first.register_forward_pre_hook(_Inside(model))
    return handle


def _watches(hook: Any, model: nn.Module) -> bool:
    return isinstance(hook, _Inside) and hook.model() is model


def _first_layer(model: nn.Module) -> nn.Module | None:
    """What sees the images, where that is sure."""
    patches = model._modules.get("patch_embed")
    return patches if patches is not None and type(patches).__name__ == "PatchEmbed" else None


class _Inside:
    """A hook of the first layer of a model: the number of images is the model's batch."""

    def __init__(self, model: nn.Module) -> None:
        self.model = weakref.ref(model)

    def __call__(self, layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        model = self.model()
        if model is None or compiled():
            return
        mixture = mixture_of(model)
        if mixture is not None and inputs and isinstance(inputs[0], Tensor):
            mixture.fit(len(inputs[0]), type(model).__name__)
            try_once(model, model.forward_features, inputs, {}, mixture)  # type: ignore[arg-type]

    def __reduce__(self) -> tuple[Any, ...]:
        return _Inside, (nn.Identity(),)  # a copy watches for nobody


def _note(model: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    if compiled():
        return _noted_in_graph(model, inputs, named)
    mixture = mixture_of(model)
    if mixture is None:
        return None
    refuse_exports()
    batch = batch_of(inputs, named)
    if batch is not None:
        mixture.fit(batch, type(model).__name__)
        try_once(model, model.forward, inputs, named, mixture)
    return None


def _noted_in_graph(model: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Pass the first tensor through an operator that notes its size when it runs."""
    for index, value in enumerate(inputs):
        if isinstance(value, Tensor) and value.dim() > 0:
            return (*inputs[:index], _noted(value, model._loca_handle), *inputs[index + 1 :]), named
    for name, value in named.items():
        if isinstance(value, Tensor) and value.dim() > 0:
            return inputs, {**named, name: _noted(value, model._loca_handle)}
    return inputs, named


def _look(x: Tensor, handle: int) -> Tensor:
    model = owner_of(handle)
    mixture = None if model is None else mixture_of(model)
    if mixture is not None:
        mixture.fit(len(x), type(model).__name__)
    return x.clone()


_noted = operator("noted_batch", _look, "(Tensor x, int handle) -> Tensor")


@_noted.register_fake
def _(x, handle):  # type: ignore[no-untyped-def]
    return torch.empty_like(x)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Nothing is needed."""


_noted.register_autograd(lambda ctx, grad: (grad, None), setup_context=_setup)
