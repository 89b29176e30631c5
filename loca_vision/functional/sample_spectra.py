"""A spectrum that some samples of a batch have: one that is trained, or one that is packed to be held in numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from loca_vision.functional.cosine_atoms import AtomSettings, Cells, Offset
from loca_vision.functional.packed_dct import packed_rows
from loca_vision.functional.token_bases import COSINES, Entries, TokenBasis, in_order
from loca_vision.functional.transforms import ordinary_tensors


@dataclass(frozen=True, slots=True)
class SampleSpectrum:
    """A spectrum of B components, alpha among its settings."""

    coefficients: Tensor
    locations: Tensor | None
    layout: Cells
    settings: AtomSettings

    def applied(self, basis: TokenBasis) -> Entries:
        """Where the coefficients stand in the matrix that takes frequencies of inputs to those of outputs."""
        return basis.applied(self.layout)

    def transposed(self, basis: TokenBasis) -> Entries:
        """The same for the transposed update."""
        return basis.applied(Cells(self.layout.cells.flip(1), self.settings.shape[::-1]))

    def products(self, basis: TokenBasis, offset: Offset) -> Entries:
        """The entries whose dot products are the coefficients' gradients, if components stood at this offset."""
        return basis.products(self.layout, offset)


@dataclass(frozen=True, slots=True)
class PackedSpectrum(SampleSpectrum):
    """Cosines that do not learn, in 8 bytes a component: sorted, with the signs of packed frequencies in the coefficients.

    Attributes:
        index: (B,) int32 row * width + column among packed frequencies, ascending.
    """

    index: Tensor

    def applied(self, basis: TokenBasis) -> Entries:
        return Entries(self.index)

    def transposed(self, basis: TokenBasis) -> Entries:
        p, q = self.settings.shape
        index = self.index.long()
        turned = index % basis.width(q) * basis.width(p) + index // basis.width(q)
        ones = torch.ones_like(self.coefficients)
        return in_order(turned, ones, torch.arange(len(index), device=index.device))


def check_packs(shape: tuple[int, int]) -> None:
    """Raise ValueError for a matrix with more frequencies than int32 can number."""
    if COSINES.width(shape[0]) * COSINES.width(shape[1]) > 2**31:
        raise ValueError(f"a {shape[0]} x {shape[1]} matrix has more frequencies than int32 can number")


def packed_cosines(
    coefficients: Sequence[Tensor],
    flat: Sequence[Tensor],
    shape: tuple[int, int],
    scale: float,
    device: torch.device | None = None,
) -> list[PackedSpectrum]:
    """Spectra for matrices of one shape (p, q), packed by one sort for all: they share two blocks of memory.

    Args:
        coefficients: (B,) of each spectrum.
        flat: (B,) of each, cells row * q + column.
        scale: alpha.
        device: of the result, by default the CPU, where it is made.

    Raises:
        ValueError: as `check_packs`.
    """
    check_packs(shape)
    width, counts = COSINES.width(shape[1]), [len(one) for one in coefficients]
    size = COSINES.width(shape[0]) * width
    cells = torch.cat(list(flat)).to(torch.int32)  # of its own, and written to: new memory takes longer than arithmetic
    rows = cells.div(shape[1], rounding_mode="floor")
    row = torch.index_select(_packed(shape[0]), 0, rows)
    col = torch.index_select(_packed(shape[1]), 0, cells.sub_(rows, alpha=shape[1]))
    negative = torch.bitwise_xor(row, col, out=cells).bitwise_and_(1)
    index = row.mul_(width).add_(col)
    firsts = torch.arange(0, size * len(counts), size, dtype=torch.int32 if size * len(counts) < 2**31 else torch.int64)
    order = torch.repeat_interleave(firsts, torch.tensor(counts)).add_(index).argsort()
    values = torch.cat(list(coefficients)).float()
    values.addcmul_(values, negative, value=-2)
    values, index = (torch.index_select(part, 0, order).to(device or "cpu") for part in (values, index))
    settings = AtomSettings(shape, scale, "central")
    parts = zip(torch.split(values, counts), torch.split(index, counts), strict=True)
    return [PackedSpectrum(own, None, _NOWHERE, settings, where) for own, where in parts]


@lru_cache(maxsize=64)
def _packed(n: int) -> Tensor:
    """(n,) int32: the row of every frequency. It is odd where the sign is negative."""
    with ordinary_tensors(), torch.device("cpu"):
        return packed_rows(torch.arange(n), n)[0].to(torch.int32)


_NOWHERE = Cells(torch.zeros(0, 2, dtype=torch.long), (1, 1))
