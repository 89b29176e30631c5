"""What an ordinary weight is: one test for everyone who reads, builds on or writes one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def is_plain_matrix(weight: object) -> bool:
    """Whether this is an ordinary floating-point matrix: not quantised, packed or sharded, whatever it looks like."""
    if not isinstance(weight, Tensor) or weight.dim() != 2 or weight.dtype not in _FLOATS:
        return False
    kind = type(weight)
    return kind in (nn.Parameter, Tensor) or kind.__module__.startswith("torch._subclasses")  # torch.export's stand-ins
