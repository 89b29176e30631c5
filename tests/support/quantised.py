"""Quantised linear layers as libraries make them, without the libraries: bits in another dtype, or a tensor in disguise."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Int8Linear(nn.Linear):
    """Weights as int8 with a scale, in a subclass of Linear."""

    scale: Tensor

    @classmethod
    def of(cls, layer: nn.Linear) -> Int8Linear:
        made = cls(layer.in_features, layer.out_features, bias=layer.bias is not None)
        made.register_buffer("scale", layer.weight.detach().abs().max() / 127)
        made.weight = nn.Parameter((layer.weight.detach() / made.scale).round().to(torch.int8), requires_grad=False)
        made.bias = layer.bias
        return made

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight.to(input.dtype) * self.scale, self.bias)


class PackedLinear(Int8Linear):
    """The same, packed into one column, as four bits are: the weight's shape says nothing."""

    @classmethod
    def of(cls, layer: nn.Linear) -> PackedLinear:
        made = super().of(layer)
        assert isinstance(made, PackedLinear)
        made.weight = nn.Parameter(made.weight.reshape(-1, 1), requires_grad=False)
        return made

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight.view(self.out_features, self.in_features)
        return F.linear(input, weight.to(input.dtype) * self.scale, self.bias)


class Disguised(Tensor):
    """Says that it is float32, computes as such, and takes no writes to heart: `copy_` changes a copy."""

    @staticmethod
    def __new__(cls, values: Tensor) -> Disguised:
        made: Any = Tensor._make_wrapper_subclass(cls, values.shape, dtype=torch.float32)  # type: ignore[attr-defined]
        made.scale = values.abs().max() / 127
        made.bits = (values / made.scale).round().to(torch.int8)
        return made  # type: ignore[no-any-return]

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def plain(value: Any) -> Any:
            return value.bits.float() * value.scale if isinstance(value, Disguised) else value

        if function is torch.ops.aten.detach.default:
            return args[0]
        return function(*(plain(arg) for arg in args), **{key: plain(arg) for key, arg in (kwargs or {}).items()})


def disguise(layer: nn.Linear) -> nn.Linear:
    """A stock Linear whose weight is a tensor subclass, as torchao's."""
    layer.weight = nn.Parameter(Disguised(layer.weight.detach()), requires_grad=False)
    return layer


QUANTISED = {"int8": Int8Linear.of, "packed": PackedLinear.of, "disguised": disguise}
