"""The real part of the inverse 2-D Fourier transform of a sparse spectrum."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from loca_vision.functional.by_products import inverse_real_by_products
from loca_vision.functional.cosine_atoms import Cells
from loca_vision.functional.transforms import exported


def inverse_real(values: Tensor, layout: Cells, norm: str = "backward") -> Tensor:
    """Return Re(ifft2(F)) of shape (p, q), where F is zero except for real values (B,) at cells (B, 2).

    The result is differentiable in the values. The real part does not change if half of a value at (u, v) is moved to (-u, -v).
    With this symmetry, half of the plane is enough, and the transform costs half as much.
    """
    shape = layout.shape
    if exported():  # exported programs may run where complex numbers are not supported
        size = math.prod(shape)
        return inverse_real_by_products(values, layout.cells, shape, 1 / (size if norm == "backward" else math.sqrt(size)))
    index, factor = layout.once(_folded)
    half = shape[1] // 2 + 1
    spectrum = values.new_zeros(shape[0] * half).index_add(0, index, torch.cat([values, values]) * factor)
    plane = torch.complex(spectrum, torch.zeros_like(spectrum)).view(shape[0], half)
    real: Tensor = torch.fft.irfft2(plane, s=shape, norm=norm)
    return real


def _folded(cells: Tensor, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return flat indices (2 B,) of cells (B, 2) and then of their mirror images in the half plane, and a factor for each.

    In columns that are their own mirror image, both the cell and its image are kept; in any other, one of the two is left out.
    """
    (rows, cols), half = shape, shape[1] // 2 + 1
    mirrored = torch.stack([-cells[:, 0] % rows, -cells[:, 1] % cols], 1)
    u, v = torch.cat([cells, mirrored]).T
    inside = v < half
    return torch.where(inside, u * half + v, 0), inside * 0.5
