"""Transforms of activations, vector by vector, in which sparse updates act as sparse matrices.

If T is the transform of a vector, x Delta W^T = T^-1(S T(x)) for a sparse S, whether Delta W is a spectrum of cosines or of
complex waves. Frequencies are stored side by side as real numbers, so that a product with S is an ordinary sparse product.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from loca_vision.functional.cosine_atoms import Cells, Offset
from loca_vision.functional.packed_dct import add_unpacked, packed, rows_for
from loca_vision.functional.sparse_products import positions


@dataclass(frozen=True)
class Entries:
    """The entries of a spectrum's components in a matrix over packed frequencies, row by row.

    Attributes:
        index: (e,) integers row * width + column, ascending.
        weights: (e,) float32, the factor of the coefficient at each entry; None for 1.
        source: (e,) int64, the component of each entry; a component may have several entries. None for one each, in order.
    """

    index: Tensor
    weights: Tensor | None = None
    source: Tensor | None = None

    def __len__(self) -> int:
        return len(self.index)


class TokenBasis(Protocol):
    """A transform with its inverse and the entries of components in it. Vectors of length n have `width(n)` frequencies."""

    def width(self, n: int) -> int: ...

    def analyse(self, x: Tensor) -> Tensor:
        """Return the frequencies (t, q') of the rows of x (t, q), float32 or float64."""

    def add_synthesis(self, y: Tensor, spectrum: Tensor) -> None:
        """Add the inverse transform of a spectrum (t, p'), which is overwritten, to the rows of y (t, p), in place."""

    def applied(self, layout: Cells) -> Entries:
        """Return the entries of the matrix (p', q') that maps frequencies of inputs to those of outputs."""

    def products(self, layout: Cells, offset: Offset = (0, 0)) -> Entries:
        """Return the entries whose dot products of output-gradient and input frequencies are the coefficients' gradients."""


class CosineBasis:
    """The discrete cosine transform, for updates sum_k a_k C[u_k]^T D[v_k]."""

    def width(self, n: int) -> int:
        return rows_for(n)

    def analyse(self, x: Tensor) -> Tensor:
        return packed(x)

    def add_synthesis(self, y: Tensor, spectrum: Tensor) -> None:
        add_unpacked(y, spectrum)

    def applied(self, layout: Cells) -> Entries:
        return self.products(layout)

    def products(self, layout: Cells, offset: Offset = (0, 0)) -> Entries:
        return layout.once(_cosine_entries, offset)


class FourierBasis:
    """The real fast Fourier transform, for updates sum_k a_k cos(2 pi (u_k i / p + v_k j / q)) / (p q)."""

    def width(self, n: int) -> int:
        return 2 * (n // 2 + 1)

    def analyse(self, x: Tensor) -> Tensor:
        return torch.view_as_real(torch.fft.rfft(x)).flatten(1)

    def add_synthesis(self, y: Tensor, spectrum: Tensor) -> None:
        y += torch.fft.irfft(torch.view_as_complex(spectrum.view(len(y), -1, 2)), y.shape[1])

    def applied(self, layout: Cells) -> Entries:
        return layout.once(_waves)

    def products(self, layout: Cells, offset: Offset = (0, 0)) -> Entries:
        return layout.once(_wave_products)


COSINES, WAVES = CosineBasis(), FourierBasis()


def in_order(index: Tensor, weights: Tensor, source: Tensor) -> Entries:
    """Return entries sorted row by row."""
    order = index.argsort()
    return Entries(index[order], weights[order].float(), source[order])


def _cosine_entries(cells: Tensor, shape: tuple[int, int], offset: Offset) -> Entries:
    rows, cols, signs = positions(cells, shape, offset)
    return in_order(rows * rows_for(shape[1]) + cols, signs, _each(cells))


def _waves(cells: Tensor, shape: tuple[int, int]) -> Entries:
    """Return the entries of real parts: half is at a cell, half, conjugate, at its mirror image; one of the two is stored."""
    (p, q), (u, v) = shape, cells.T
    (row, conjugate), (col, beyond) = _stored(u, p), _stored(v, q)
    alone = (2 * u) % p == 0  # its own mirror image: a real number
    real = torch.where(alone, 1 / q, 0.5 / q)
    imaginary = torch.where(alone, 0.0, -0.5 / q * conjugate * beyond)
    return _pairs(row, col, real, imaginary, cells, q)


def _wave_products(cells: Tensor, shape: tuple[int, int]) -> Entries:
    (p, q), (u, v) = shape, cells.T
    (row, conjugate), (col, beyond) = _stored(u, p), _stored(v, q)
    size = torch.full_like(conjugate, 1 / math.prod(shape))
    return _pairs(row, col, size, -size * conjugate * beyond, cells, q)


def _stored(frequency: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Return the index of frequencies (B,) among the n // 2 + 1 stored ones, and -1 if the conjugate is there, else 1."""
    lower = frequency <= n // 2
    return torch.where(lower, frequency, n - frequency), torch.where(lower, 1.0, -1.0)


def _pairs(row: Tensor, col: Tensor, real: Tensor, imaginary: Tensor, cells: Tensor, q: int) -> Entries:
    each, width = _each(cells), 2 * (q // 2 + 1)
    index = 2 * row * width + 2 * col
    return in_order(torch.cat([index, index + width + 1]), torch.cat([real, imaginary]), torch.cat([each, each]))


def _each(cells: Tensor) -> Tensor:
    return torch.arange(len(cells), device=cells.device)
