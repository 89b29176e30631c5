"""The real part of the inverse 2-D Fourier transform of a sparse spectrum."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from loca_vision.functional.by_products import inverse_real_by_products
from loca_vision.functional.cosine_atoms import Cells
from loca_vision.functional.transforms import exported


def inverse_real(values: Tensor, layout: Cells, norm: str = "backward") -> Tensor:
    """Re(ifft2(F)) of shape (p, q), F zero but for real values (B,) at the cells (B, 2); differentiable in the values.

    The real part is the same for a value at (u, v) and half of it there, half of it at (-u, -v): with that symmetry half of
    the plane is enough, and the transform costs half as much.
    """
    shape = layout.shape
    if exported():  # programs may run where nothing computes with complex numbers
        size = math.prod(shape)
        return inverse_real_by_products(values, layout.cells, shape, 1 / (size if norm == "backward" else math.sqrt(size)))
    index, factor = layout.once(_folded)
    half = shape[1] // 2 + 1
    spectrum = values.new_zeros(shape[0] * half).index_add(0, index, torch.cat([values, values]) * factor)
    plane = torch.complex(spectrum, torch.zeros_like(spectrum)).view(shape[0], half)
    real: Tensor = torch.fft.irfft2(plane, s=shape, norm=norm)
    return real


def _folded(cells: Tensor, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Where cells (B, 2), and then their mirror images, fall in the half plane: flat (2 B,) indices, and a factor of each.

    In the columns that are their own mirror image both stand for themselves; in any other one of the two is left out.
    """
    (rows, cols), half = shape, shape[1] // 2 + 1
    mirrored = torch.stack([-cells[:, 0] % rows, -cells[:, 1] % cols], 1)
    u, v = torch.cat([cells, mirrored]).T
    inside = v < half
    return torch.where(inside, u * half + v, 0), inside * 0.5
