"""Multiply sparse spectra by matrices whose rows are frequencies, and compute dot products at their cells."""

from __future__ import annotations

import torch
from torch import Tensor

from loca_vision.functional.cosine_atoms import Cells, Offset, row_major, shifted
from loca_vision.functional.packed_dct import empty_spectrum, packed_rows, rows_for


def spectrum_of(layout: Cells, values: Tensor) -> Tensor:
    """Return the sparse (p', q') matrix of values (B,) at their cells, which maps frequencies of inputs to those of outputs."""
    return _placed(layout, values, False)


def transposed_of(layout: Cells, values: Tensor) -> Tensor:
    """Return the transpose of `spectrum_of`, (q', p')."""
    return _placed(layout, values, True)


def product(spectrum: Tensor, frequencies: Tensor, onto: Tensor | None = None) -> Tensor:
    """Return a sparse spectrum (p', q') times frequencies (q', n), (p', n), laid out for `add_samples` or added to `onto`."""
    if frequencies.device.type != "cpu":
        return spectrum @ frequencies if onto is None else onto.add_(spectrum @ frequencies)
    if onto is not None:
        return torch.addmm(onto, spectrum, frequencies, out=onto)
    result = empty_spectrum(len(spectrum), frequencies.shape[1], frequencies)
    return torch.addmm(result, spectrum, frequencies, beta=0, out=result)


def read_at(whole: Tensor, layout: Cells, offset: Offset) -> Tensor:
    """Return the values (B,) of a whole spectrum (p', q') at cells shifted by the offset."""
    rows, cols, signs = layout.once(positions, offset)
    return whole[rows, cols].mul_(signs)


class Sums:
    """Sums over tokens at cells or at their neighbours, held in a sparse matrix with only these entries."""

    def __init__(self, layout: Cells, offset: Offset, dtype: torch.dtype) -> None:
        (self.order, starts, cols), self.signs = layout.once(_pattern, offset)
        zeros = torch.zeros(len(cols), dtype=dtype, device=cols.device)
        self.matrix = torch.sparse_csr_tensor(starts, cols, zeros, _size(layout.shape), check_invariants=False)

    def add(self, left: Tensor, right: Tensor) -> None:
        """Add the dot products of the rows of left (p', n) and right (q', n) that belong to each cell."""
        torch.sparse.sampled_addmm(self.matrix, left, right.T, out=self.matrix)

    def values(self) -> Tensor:
        """Return the sums (B,) in the order of the components."""
        values = self.matrix.values()
        return torch.empty_like(values).index_copy_(0, self.order, values).mul_(self.signs)


def _placed(layout: Cells, values: Tensor, transposed: bool) -> Tensor:
    (order, starts, cols), signs = layout.once(_pattern, (0, 0), transposed)
    size = _size(layout.shape)
    ordered = (values * signs)[order]
    return torch.sparse_csr_tensor(starts, cols, ordered, size[::-1] if transposed else size, check_invariants=False)


def _pattern(
    cells: Tensor, shape: tuple[int, int], offset: Offset, transposed: bool = False
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Return cells shifted by the offset as a CSR pattern over packed rows, and their signs (B,)."""
    rows, cols, signs = positions(cells, shape, offset)
    size, pair = _size(shape), (rows, cols)
    if transposed:
        size, pair = size[::-1], pair[::-1]
    return row_major(torch.stack(pair, 1), size), signs


def positions(cells: Tensor, shape: tuple[int, int], offset: Offset) -> tuple[Tensor, Tensor, Tensor]:
    """Return packed rows, packed columns and signs (B,) of cells shifted by the offset."""
    moved = shifted(cells, offset, shape)
    (rows, row_signs), (cols, col_signs) = (packed_rows(moved[:, axis], n) for axis, n in enumerate(shape))
    return rows, cols, row_signs * col_signs


def _size(shape: tuple[int, int]) -> tuple[int, int]:
    return rows_for(shape[0]), rows_for(shape[1])
