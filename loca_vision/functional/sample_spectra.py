"""A spectrum that some samples of a batch have: one that is trained, or one that is packed to be held in numbers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from loca_vision.functional.cosine_atoms import AtomSettings, Cells, Offset
from loca_vision.functional.token_bases import COSINES, Entries, TokenBasis, in_order


@dataclass(frozen=True)
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


@dataclass(frozen=True)
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


def packed_cosines(coefficients: Tensor, cells: Tensor, settings: AtomSettings) -> PackedSpectrum | None:
    """Coefficients (B,) at cells (B, 2), packed; None where int32 cannot number the frequencies."""
    p, q = settings.shape
    if COSINES.width(p) * COSINES.width(q) > 2**31:
        return None
    layout = Cells(cells, settings.shape)
    entries = COSINES.applied(layout)
    assert entries.weights is not None and entries.source is not None
    values = coefficients.detach()[entries.source] * entries.weights
    return PackedSpectrum(values, None, _NOWHERE, settings, entries.index.to(torch.int32))


_NOWHERE = Cells(torch.zeros(0, 2, dtype=torch.long), (1, 1))
