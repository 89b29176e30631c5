"""The spectrum of some samples of a batch: one that can be trained, or one that is packed so that many can be held."""

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
    """A spectrum of B components, whose settings include alpha."""

    coefficients: Tensor
    locations: Tensor | None
    layout: Cells
    settings: AtomSettings

    def applied(self, basis: TokenBasis) -> Entries:
        """Return the coefficients' entries in the matrix that maps frequencies of inputs to those of outputs."""
        return basis.applied(self.layout)

    def transposed(self, basis: TokenBasis) -> Entries:
        """Return the same as `applied` for the transposed update."""
        return basis.applied(Cells(self.layout.cells.flip(1), self.settings.shape[::-1]))

    def products(self, basis: TokenBasis, offset: Offset) -> Entries:
        """Return the entries whose dot products would be the coefficients' gradients if components were at this offset."""
        return basis.products(self.layout, offset)


@dataclass(frozen=True, slots=True)
class PackedSpectrum(SampleSpectrum):
    """Cosines that cannot be trained, in 8 bytes per component.

    The components are sorted, and the signs of the packed frequencies are included in the coefficients.

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
    """Return packed spectra for matrices of one shape (p, q); one sort packs them all, and they share two blocks of memory.

    Args:
        coefficients: the coefficients (B,) of each spectrum.
        flat: the cells (B,) of each spectrum, as row * q + column.
        shape: (p, q).
        scale: alpha.
        device: the device of the result; by default the CPU, where it is computed.

    Raises:
        ValueError: as in `check_packs`.
    """
    check_packs(shape)
    width, counts = COSINES.width(shape[1]), [len(one) for one in coefficients]
    size = COSINES.width(shape[0]) * width
    cells = torch.cat(list(flat)).to(torch.int32)  # reused below, because allocating takes longer than arithmetic
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
    """Return the row of every frequency, (n,) int32; it is odd if the sign is negative."""
    with ordinary_tensors(), torch.device("cpu"):
        return packed_rows(torch.arange(n), n)[0].to(torch.int32)


_NOWHERE = Cells(torch.zeros(0, 2, dtype=torch.long), (1, 1))
