"""The one test for an ordinary weight, used wherever a weight is read, built on or written."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def is_plain_matrix(weight: object) -> bool:
    """Whether this is an ordinary floating-point matrix, rather than a quantised, packed or sharded one that looks like it."""
    return isinstance(weight, Tensor) and weight.dim() == 2 and _is_ordinary(weight)


def as_matrix(weight: object) -> Tensor | None:
    """Return an ordinary weight as a matrix (p, q) in the same memory, or None if that is impossible.

    This is the weight itself, or a view of the weight (p, q, 1, 1) of a 1 x 1 convolution.
    """
    if not isinstance(weight, Tensor) or not _is_ordinary(weight):
        return None
    if weight.dim() == 4 and weight.shape[2:] == (1, 1):
        return weight.flatten(1)
    return weight if weight.dim() == 2 else None


def _is_ordinary(weight: Tensor) -> bool:
    kind = type(weight)
    known = kind in (nn.Parameter, Tensor) or kind.__module__.startswith("torch._subclasses")  # torch.export's stand-ins
    return known and weight.dtype in _FLOATS
