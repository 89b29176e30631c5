"""The orthonormal Haar wavelet transform for any size."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def haar2(x: Tensor) -> Tensor:
    """Return the 2-D Haar transform over the last two axes, (..., rows, cols): all levels along one axis, then the other.

    Along each axis, the coarsest average comes first, followed by details from coarse to fine. If the number of averages is
    odd, the last one is passed on to the next level unchanged, which keeps the transform orthonormal.
    """
    return _forward(_forward(x).transpose(-1, -2)).transpose(-1, -2)


def inverse_haar2(x: Tensor) -> Tensor:
    """Return the inverse of `haar2`, which is its transpose: (..., rows, cols)."""
    return _inverse(_inverse(x).transpose(-1, -2)).transpose(-1, -2)


def _forward(x: Tensor) -> Tensor:
    details = []
    while x.shape[-1] > 1:
        pairs, odd = _paired(x)
        details.append((pairs[..., 0] - pairs[..., 1]) * math.sqrt(0.5))
        x = torch.cat([(pairs[..., 0] + pairs[..., 1]) * math.sqrt(0.5), odd], -1)
    return torch.cat([x, *reversed(details)], -1)


def _inverse(x: Tensor) -> Tensor:
    size = x.shape[-1]
    lengths = [size]
    while lengths[-1] > 1:
        lengths.append((lengths[-1] + 1) // 2)
    averages = x[..., :1]
    for coarse, fine in zip(lengths[:0:-1], lengths[-2::-1], strict=True):
        details = x[..., coarse:fine]
        paired = averages[..., : fine - coarse]
        halves = torch.stack([paired + details, paired - details], -1) * math.sqrt(0.5)
        averages = torch.cat([halves.flatten(-2), averages[..., fine - coarse :]], -1)
    return averages


def _paired(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return pairs of neighbours (..., n // 2, 2), and the last value if n is odd."""
    even = x.shape[-1] // 2 * 2
    return x[..., :even].reshape(*x.shape[:-1], -1, 2), x[..., even:]
