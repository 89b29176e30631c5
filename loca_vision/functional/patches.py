"""A matrix that is a sum of small patches, one for each coefficient: single entries, or the atoms of a wavelet."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Bank(NamedTuple):
    """The reconstruction filters of a wavelet, both of one even length L, like `rec_lo` and `rec_hi` in PyWavelets.

    Attributes:
        low: the filter (L,) of averages.
        high: the filter (L,) of details.
    """

    low: tuple[float, ...]
    high: tuple[float, ...]


class Patches(NamedTuple):
    """The positions and values of B patches of n numbers.

    Attributes:
        where: (B, n) int64, the entries of the matrix as row * q + column.
        values: (B, n) float32; 0 for entries that would be outside the matrix.
    """

    where: Tensor
    values: Tensor


def scattered(coefficients: Tensor, patches: Patches, shape: tuple[int, int]) -> Tensor:
    """Return the sum (p, q) of coefficients (B,) times their patches, differentiable in the coefficients."""
    terms = coefficients[:, None] * patches.values.to(coefficients.dtype)
    flat = coefficients.new_zeros(shape[0] * shape[1]).index_add(0, patches.where.flatten(), terms.flatten())
    return flat.view(shape)


def entries(cells: Tensor, shape: tuple[int, int]) -> Patches:
    """Return a patch with a single 1 at each of the cells (B, 2)."""
    index = cells[:, :1] * shape[1] + cells[:, 1:]
    return Patches(index, torch.ones_like(index, dtype=torch.float32))


def wavelet_atoms(cells: Tensor, shape: tuple[int, int], bank: Bank) -> Patches:
    """Return the atoms, L x L numbers each, of a one-level wavelet transform at the cells (B, 2) of its coefficients.

    The coefficients form a matrix of the size of the result, or larger by the L - 2 that the transform needs beyond the border;
    the cells are its middle. Its upper left quarter holds averages along both axes, and the lower right one details along both.
    The upper right one holds details along the rows' axis and averages along the other, as PyWavelets' `cH` does, and the
    lower left one the reverse.
    """
    (u, rows), (v, cols) = (_padded(cells[:, axis], shape[axis], len(bank.low)) for axis in (0, 1))
    lower, right = u >= rows // 2, v >= cols // 2
    down, downs = _taps(
        u % (rows // 2), right, bank, shape[0]
    )  # the half of the columns determines the filter along the rows' axis
    across, acrosses = _taps(v % (cols // 2), lower, bank, shape[1])
    index = down[:, :, None] * shape[1] + across[:, None]
    return Patches(index.flatten(1), (downs[:, :, None] * acrosses[:, None]).flatten(1))


def _padded(cells: Tensor, size: int, length: int) -> tuple[Tensor, int]:
    """Return the positions of cells (B,) along an axis extended as far as the filters need, and the axis' even length."""
    longer = size + length - 2
    longer += longer % 2
    return cells + (longer - size) // 2, longer


def _taps(place: Tensor, detail: Tensor, bank: Bank, size: int) -> tuple[Tensor, Tensor]:
    """Return the entries (B, L) along an axis that coefficients (B,) of a band affect, and their factors, 0 outside."""
    at = 2 * place[:, None] + torch.arange(2 - len(bank.low), 2, device=place.device)
    low, high = (torch.tensor(taps, dtype=torch.float32, device=place.device) for taps in bank)
    inside = (at >= 0) & (at < size)
    return at.clamp(0, size - 1), torch.where(detail[:, None], high, low) * inside
