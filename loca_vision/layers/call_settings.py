"""The settings of a call that all updates of a model share: its scale, and low memory."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from loca_vision.functional.transforms import compiled, exported


class CallSettings(nn.Module):
    """How strongly all adapters of a model act in this call, and whether to spare memory.

    Attributes:
        scale_tensor: the scale of the call, (); compiled code reads it, so that another scale compiles nothing anew.
        scale: the same number for eager code; 1 in compiled code, which multiplies by `scale_tensor`.
        low_memory: apply updates to activations instead of building weights for them.
    """

    scale_tensor: Tensor

    def __init__(self) -> None:
        super().__init__()
        self._scale: float | None = 1.0  # None: compiled code has written scale_tensor, and nothing else
        self.low_memory = False
        self.register_buffer("scale_tensor", torch.ones((), device="cpu"), persistent=False)

    @property
    def scale(self) -> float:
        if compiled():
            return 1.0
        return float(self.scale_tensor) if self._scale is None else self._scale

    def set_scale(self, scale: float) -> None:
        if compiled():  # dynamo would take the number itself for a constant, but not a product with it
            self.scale_tensor.copy_(torch.ones_like(self.scale_tensor) * scale)
            self._scale = None
        else:
            if not exported():  # which would take the write for a part of the program
                self.scale_tensor.fill_(scale)
            self._scale = scale

    def scaled_in_graph(self, value: Tensor) -> Tensor:
        """`value` times the scale in compiled code; `value` itself in eager code, where `scale` is multiplied in before."""
        return value * self.scale_tensor if compiled() else value
