"""The settings of a call that the updates of a model share: its scale, and low memory."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class CallSettings(nn.Module):
    """What holds for all updates of one model: how strongly they act in this call, and whether memory is to be spared.

    Attributes:
        factor: multiplies every adapter's own, (); compiled code reads it, so that another strength compiles nothing anew.
        number: the same, for eager code; 1 for compiled code, which applies the factor itself.
        low_memory: apply updates to activations instead of building weights for them.
    """

    factor: Tensor

    def __init__(self) -> None:
        super().__init__()
        self._number: float | None = 1.0  # None: compiled code has written the factor, and the factor alone
        self.low_memory = False
        self.register_buffer("factor", torch.ones((), device="cpu"), persistent=False)

    @property
    def number(self) -> float:
        if torch.compiler.is_compiling():
            return 1.0
        return float(self.factor) if self._number is None else self._number

    def set_strength(self, strength: float) -> None:
        if torch.compiler.is_compiling():  # a product with a number is what dynamo leaves open; kept, it would be a constant
            self.factor.copy_(torch.ones_like(self.factor) * strength)
            self._number = None
        else:
            self.factor.fill_(strength)
            self._number = strength
