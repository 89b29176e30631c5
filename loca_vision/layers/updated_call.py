"""Calls of linear layers that have updates."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from loca_vision.functional.transforms import compiled
from loca_vision.layers.attention_layouts import base_of
from loca_vision.layers.class_swap import once_while_traced
from loca_vision.layers.effective_weight import EffectiveWeight
from loca_vision.layers.mixed_call import may_mix, with_updates_of_call
from loca_vision.layers.targets import readable_weight


class UpdatedCall:
    """A linear layer that is called. A subclass defines which layer this is and how it is called without updates.

    For a plain `torch.nn.Linear`, one product with the effective weight is computed. A layer that is hooked, wrapped or
    quantised is called itself, and the term of the updates is added to its output.

    Attributes:
        effective_weight: W + the updates.
    """

    effective_weight: EffectiveWeight

    def _layer(self) -> Any:
        """Return the layer that is there now."""
        raise NotImplementedError

    def _without_updates(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        raise NotImplementedError

    def _is_plain(self, layer: Any) -> bool:
        """Whether calling the layer only multiplies by its weight, and the weight can be read."""
        raise NotImplementedError

    def _may_keep(self, layer: Any, x: Tensor) -> bool:
        """Whether a matrix may be cached; not for an offloaded layer, because the cache would undo the offloading."""
        raise NotImplementedError

    def _called(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        layer = self._layer()
        if may_mix(self.effective_weight):
            result = self._without_updates(x, *args, **kwargs)
            own = not args and not kwargs and self._is_plain(layer)
            return with_updates_of_call(self.effective_weight, x, result, self._base, in_place=own)
        if compiled():
            self._prepare()
        plain = not args and not kwargs and self._is_plain(layer)
        if plain and not compiled() and not self._saves_memory():
            weight, bias = layer._parameters["weight"], layer.bias
            learned = self.effective_weight.learned_linear(x, weight, bias)
            return F.linear(x, self.effective_weight(weight), bias) if learned is None else learned
        if not self._acts():
            return self._without_updates(x, *args, **kwargs)
        if plain and not self._saves_memory():
            return F.linear(x, self.effective_weight(layer.weight), layer.bias)
        result = self._without_updates(x, *args, **kwargs)
        return result + self._term(layer, x, result.shape[-1]).to(result.dtype)

    def _term(self, layer: Any, x: Tensor, rows: int) -> Tensor:
        return self.effective_weight.applied(x, rows, keep=self._may_keep(layer, x), base=self._base)

    def _base(self) -> Tensor:
        return readable_weight(self._layer(), "the layer")

    def _saves_memory(self) -> bool:
        """Whether low memory is requested and possible; it is impossible if gradients of the updates are recorded."""
        return self.effective_weight.call_settings.low_memory and not (
            torch.is_grad_enabled() and self.effective_weight.learns()
        )

    def _acts(self) -> bool:
        """Whether any update acts; in compiled code, whether there are updates at all, as the buffer holds the active ones."""
        if compiled():
            return len(self.effective_weight.all_updates()) > 0  # bool of a list is unknown to compilers of torch before 2.14
        return self.effective_weight.acts()

    def _prepare(self) -> None:
        """While code is traced, fill the buffer, or drop it if updates may change or memory is to be saved."""
        if self.effective_weight.learns() or self.effective_weight.call_settings.low_memory:
            self.effective_weight.drop()
        else:
            self._settle()

    @once_while_traced
    def _settle(self) -> None:
        weight = base_of(self._layer())._parameters.get("weight")
        if isinstance(weight, Tensor) and weight.is_floating_point():
            self.effective_weight.settle(weight)


def is_hooked(layer: nn.Module) -> bool:
    """Whether calling the layer also runs hooks: those of torch, or of accelerate and diffusers, which replace `forward`."""
    return "forward" in layer.__dict__ or bool(
        layer._forward_pre_hooks or layer._forward_hooks or layer._backward_hooks or layer._backward_pre_hooks
    )
