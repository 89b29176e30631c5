"""Sums of atoms by ordinary matrix products, for torch.export and torch.func, which cannot see operators of our own.

They cost O(p q (p + q)) and need no cache. Every operation has derivatives of any order and a batching rule.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from loca_vision.functional.cosine_atoms import AtomSettings, shifted, slope_steps
from loca_vision.functional.transforms import transformed


def cosine_sum_by_products(coefficients: Tensor, locations: Tensor, cells: Tensor, settings: AtomSettings) -> Tensor:
    """Return the same as `cosine_sum`, (p, q).

    The gradient of the locations comes from a term that is zero, but linear in how far they move.

    Args:
        coefficients: (B,).
        locations: (B, 2) in [0, 1]; if detached, they get no gradient and cost nothing.
        cells: (B, 2) int64.
        settings: shape, scale and difference.
    """
    spectrum = _dense(coefficients, cells, settings.shape)
    if locations.requires_grad or transformed():  # torch.func does not show in a tensor that its derivative is needed
        moved = (locations - locations.detach()) * coefficients.detach()[:, None]
        for axis, size in enumerate(settings.shape):
            for step, weight in slope_steps(settings.difference):
                neighbours = shifted(cells, (step, 0) if axis == 0 else (0, step), settings.shape)
                spectrum = spectrum + _dense(moved[:, axis] * (weight * (size - 1)), neighbours, settings.shape)
    left, right = (_cosines(n, coefficients) for n in settings.shape)
    return settings.scale * (left.T @ spectrum @ right)


def inverse_real_by_products(values: Tensor, cells: Tensor, shape: tuple[int, int], scale: float) -> Tensor:
    """Return scale * Re(sum of values exp(2 pi i (u k / p + v l / q))), (p, q), for values (B,) at cells (B, 2)."""
    spectrum = _dense(values, cells, shape)
    (rows, row_sines), (cols, col_sines) = (_turns(n, values) for n in shape)
    return scale * (rows @ spectrum @ cols - row_sines @ spectrum @ col_sines)


def _dense(values: Tensor, cells: Tensor, shape: tuple[int, int]) -> Tensor:
    flat = cells[:, 0] * shape[1] + cells[:, 1]
    zeros = torch.zeros(math.prod(shape), dtype=values.dtype, device=values.device)
    return zeros.scatter_add(0, flat, values).view(shape)


def _cosines(n: int, like: Tensor) -> Tensor:
    """Return the (n, n) orthonormal DCT-II matrix; angles are reduced as integers, so float32 cosines are accurate enough."""
    index = torch.arange(n, device=like.device)
    angle = (index[:, None] * (2 * index + 1)) % (4 * n)
    matrix = torch.cos(angle.to(like.dtype) * (math.pi / (2 * n))) * math.sqrt(2 / n)
    return torch.where(index[:, None] == 0, math.sqrt(1 / n), matrix)


def _turns(n: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return the (n, n) cosines and sines of the discrete Fourier transform."""
    index = torch.arange(n, device=like.device)
    angle = ((index[:, None] * index) % n).to(like.dtype) * (2 * math.pi / n)
    return torch.cos(angle), torch.sin(angle)
