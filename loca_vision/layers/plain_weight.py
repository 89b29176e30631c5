"""What an ordinary weight is: one test for everyone who reads, builds on or writes one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def is_plain_matrix(weight: object) -> bool:
    """Whether this is an ordinary floating-point matrix: not quantised, packed or sharded, whatever it looks like."""
    return isinstance(weight, Tensor) and weight.dim() == 2 and _is_ordinary(weight)


def as_matrix(weight: object) -> Tensor | None:
    """An ordinary weight as a matrix (p, q) in the same memory: itself, or a view of a 1 x 1 convolution's (p, q, 1, 1)."""
    if not isinstance(weight, Tensor) or not _is_ordinary(weight):
        return None
    if weight.dim() == 4 and weight.shape[2:] == (1, 1):
        return weight.flatten(1)
    return weight if weight.dim() == 2 else None


def _is_ordinary(weight: Tensor) -> bool:
    kind = type(weight)
    known = kind in (nn.Parameter, Tensor) or kind.__module__.startswith("torch._subclasses")  # torch.export's stand-ins
    return known and weight.dtype in _FLOATS
