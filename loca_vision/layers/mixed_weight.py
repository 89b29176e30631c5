"""The weight of a linear layer, for code that reads it and multiplies by it while every sample has its own adapters."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from loca_vision.layers.mixed_call import with_updates_of_call

if TYPE_CHECKING:
    from loca_vision.layers.effective_weight import EffectiveWeight


class MixedWeight(Tensor):
    """W, for which `F.linear` adds each sample's own updates. No other computation is possible with it.

    BEiT, EVA and Swin V2 compute `F.linear(x, layer.weight, bias)` outside their layers' `forward`.
    """

    loca: EffectiveWeight
    base: Tensor

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named = kwargs or {}
        if func is F.linear:
            return _linear(*args, **named)
        if func in _LOOKS or getattr(func, "__name__", "") == "__get__":  # sizes, dtype, device
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **named)
        raise RuntimeError(
            f"per_sample: the model computes {getattr(func, '__name__', func)} with the weight of an adapted layer, and only a "
            "linear map can have a weight for each sample"
        )


_LOOKS = (Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, Tensor.stride, Tensor.__len__)


def mixed_weight(base: Tensor, updates: EffectiveWeight) -> Tensor:
    """Return W (n, q) as a `MixedWeight`, for a call that mixes adapters."""
    weight = base.as_subclass(MixedWeight)
    weight.loca, weight.base = updates, base
    return weight


def _linear(input: Tensor, weight: MixedWeight, bias: Tensor | None = None) -> Tensor:
    result = F.linear(input, weight.base, bias)
    return with_updates_of_call(weight.loca, input, result, lambda: weight.base, in_place=True)
