"""Find the batch size that a model is called with, for calls that mix adapters."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from loca_vision.functional.transforms import compiled
from loca_vision.layers.mixed_call import operator, refuse_trace
from loca_vision.layers.mixtures import batch_of, mixture_of, owner_of
from loca_vision.model.trial import Trial, try_once
from loca_vision.model.watching import Watch, watch


def watch_batches(model: nn.Module) -> int:
    """Watch the batch sizes in calls of the model and of a timm model's `forward_features`, and return the model's handle."""
    first = _first_layer(model) if hasattr(model, "forward_features") else None
    if first is not None:
        watch(model, _Inside, first._forward_pre_hooks, first.register_forward_pre_hook)
    register = partial(model.register_forward_pre_hook, with_kwargs=True)
    return watch(model, _Before, model._forward_pre_hooks, register)


def _first_layer(model: nn.Module) -> nn.Module | None:
    """Return the layer that is called with the images, or None if that is uncertain."""
    patches = model._modules.get("patch_embed")
    return patches if patches is not None and type(patches).__name__ == "PatchEmbed" else None


class _Inside(Watch):
    """A hook on a model's first layer, where the number of images is the batch size of the model."""

    def __call__(self, layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        model: Any = None if compiled() else owner_of(self.handle)
        if model is not None and inputs and isinstance(inputs[0], Tensor):
            _begin(model, model.forward_features, inputs, {})


class _Before(Watch):
    """A hook on the model, where the length of the first tensor is the batch size."""

    def __call__(self, model: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        if compiled():
            return None if self.handle == 0 else _noted_in_graph(self.handle, inputs, named)
        _begin(model, model.forward, inputs, named)
        return None


def _begin(model: nn.Module, call: Callable[..., Any], inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
    mixture = mixture_of(model)
    if mixture is None or isinstance(mixture, Trial):
        return
    refuse_trace()
    batch = batch_of(inputs, named)
    if batch is not None:
        mixture.begin(batch, model)
        try_once(model, call, inputs, named, mixture)


def _noted_in_graph(handle: int, inputs: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Pass the first tensor through an operator that records its size when it runs."""
    for index, value in enumerate(inputs):
        if isinstance(value, Tensor) and value.dim() > 0:
            return (*inputs[:index], _noted(value, handle), *inputs[index + 1 :]), named
    for name, value in named.items():
        if isinstance(value, Tensor) and value.dim() > 0:
            return inputs, {**named, name: _noted(value, handle)}
    return inputs, named


def _look(x: Tensor, handle: int) -> Tensor:
    model = owner_of(handle)
    mixture = None if model is None else mixture_of(model)
    if model is not None and mixture is not None:
        mixture.begin(len(x), model)
    return x.clone()


_noted = operator("noted_batch", _look, "(Tensor x, int handle) -> Tensor")


@_noted.register_fake
def _(x, handle):  # type: ignore[no-untyped-def]
    return torch.empty_like(x)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Save nothing: the backward pass needs nothing."""


_noted.register_autograd(lambda ctx, grad: (grad, None), setup_context=_setup)
