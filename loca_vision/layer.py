"""A linear layer whose `weight` reads as W + Delta W, for whoever reads it.

The class of the layer is exchanged for a subclass with a `weight` property; the parameter W stays where it is, so every
key of the `state_dict` does too. Code that goes around `forward`, `F.linear(x, layer.weight)` as in BEiT, EVA and
Swin V2, is adapted like code that does not.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from loca_vision.classes import exchange_class, once_while_traced
from loca_vision.updates import WeightUpdates


class AdaptedLayer(nn.Module):
    """Mixed into the class of a layer that carries `WeightUpdates` as its child `loca`."""

    original_class: type[nn.Module]
    loca: WeightUpdates
    bias: Tensor | None

    @property
    def weight(self) -> Tensor:
        try:
            if torch.compiler.is_compiling():
                if self.loca.learns():
                    self.loca.drop()
                else:
                    self._settle()
            updated: Tensor = self.loca(base_weight(self))
        except AttributeError as error:  # which Python would answer by looking the name up elsewhere: with the base weight
            raise RuntimeError(f"the adapted weight cannot be built: {error}") from error
        return updated

    @weight.setter
    def weight(self, value: object) -> None:
        raise RuntimeError("the weight of an adapted layer is W + Delta W, to be read only: remove or merge its adapters first")

    def forward(self, *inputs: Tensor, **named: Tensor) -> Tensor:
        plain = self.original_class.forward is nn.Linear.forward and len(inputs) == 1 and not named
        if plain and self.loca.learns_alone(base_weight(self)):
            return self.loca.linear(inputs[0], base_weight(self), self.bias)
        result: Tensor = super().forward(*inputs, **named)
        return result

    @once_while_traced
    def _settle(self) -> None:
        self.loca.settle(base_weight(self))

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _empty_adapted, (self.original_class,), self.__dict__.copy()


def base_weight(layer: nn.Module) -> Tensor:
    """W itself, whatever `layer.weight` reads as."""
    weight = layer._parameters.get("weight")
    if weight is None:
        raise RuntimeError(
            "the layer has no weight of its own any more: parametrize it before its adapters come, or not at all"
        )
    return weight


_adapted_classes: dict[type[nn.Module], type[nn.Module]] = {}


def adapted_class(original: type[nn.Module]) -> type[nn.Module]:
    """The one subclass of `original` whose weight is adapted."""
    if original not in _adapted_classes:
        attributes = {"original_class": original, "__module__": original.__module__, "__doc__": original.__doc__}
        _adapted_classes[original] = type(f"Adapted{original.__name__}", (AdaptedLayer, original), attributes)
    return _adapted_classes[original]


def _empty_adapted(original: type[nn.Module]) -> nn.Module:
    cls = adapted_class(original)
    return cls.__new__(cls)


def adapt(layer: nn.Module) -> WeightUpdates:
    """Make `layer` read its weight through its updates, and return them; a layer that does already stays as it is."""
    if isinstance(layer, AdaptedLayer):
        return layer.loca
    updates = WeightUpdates()
    layer.add_module("loca", updates)
    exchange_class(layer, adapted_class(type(layer)))
    return updates


def restore(layer: AdaptedLayer) -> None:
    """Give the layer its own class back; its parameters were never touched."""
    del layer._modules["loca"]
    exchange_class(layer, layer.original_class)
