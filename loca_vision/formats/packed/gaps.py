"""Ascending cells as bytes: Rice codes of the steps from each to the next, for all projections in one stream of bits.

The remainders of all steps come first, then their quotients in unary, so each part can be found without decoding earlier ones.
Bit i of the stream is bit i % 8 of byte i // 8, where bit 0 is the least significant.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_BITS = 8
_WINDOW = 5  # bytes: a remainder has at most 31 bits and can begin at any bit of a byte


@dataclass(frozen=True)
class Row:
    """One projection: its name, its matrix (p, q) and its number of components, from 1 to p q."""

    name: str
    shape: tuple[int, int]
    count: int

    @property
    def width(self) -> int:
        """Bits of a remainder: floor(log2(p q / B)), from the mean step p q / B."""
        return (self.shape[0] * self.shape[1] // self.count).bit_length() - 1


def check_size(size: int, rows: Sequence[Row]) -> None:
    """Raise ValueError unless that many bytes can hold these cells, judging by headers alone, before anything is read.

    The quotients of B steps add up to less than 2 B, since the last cell is below p q.
    """
    least = sum(row.count * (row.width + 1) for row in rows)
    most = sum(row.count * (row.width + 3) for row in rows)
    if not least <= _BITS * size < most + _BITS:
        count = sum(row.count for row in rows)
        raise ValueError(f"cells has {size} bytes: {count} components take from {-(-least // _BITS)} to {-(-most // _BITS)}")


def packed_cells(cells: Sequence[Tensor], rows: Sequence[Row]) -> Tensor:
    """Return the bytes (n,) uint8 of the ascending cells (B,) int64 of each projection."""
    steps, widths = torch.cat([one.diff(prepend=one.new_zeros(1)) for one in cells]), _widths(rows)
    begins, start = widths.cumsum(0) - widths, int(widths.sum())
    ends = start + ((steps >> widths) + 1).cumsum(0) - 1
    bits = torch.zeros(-(-(int(ends[-1]) + 1) // _BITS) * _BITS, dtype=torch.uint8)
    bits[ends] = 1
    for place in range(int(widths.max())):
        there = widths > place
        bits[begins[there] + place] = (steps[there] >> place & 1).to(torch.uint8)
    return (bits.view(-1, _BITS) << torch.arange(_BITS, dtype=torch.uint8)).sum(1, dtype=torch.uint8)


def unpacked_cells(data: Tensor, rows: Sequence[Row]) -> list[Tensor]:
    """Return the cells (B,) int32 of each projection, from bytes (n,) uint8 of a size that `check_size` accepted.

    Raises:
        ValueError: bits are missing or left over, or a cell is outside its matrix; the error names the projection.
    """
    widths = _widths(rows)
    steps = (_quotients(data, rows, int(widths.sum())) << widths) + _remainders(data, widths)
    counts = torch.tensor([row.count for row in rows])
    sums, first = steps.cumsum(0), counts.cumsum(0) - counts
    cells = sums - (sums - steps)[first].repeat_interleave(counts)
    found = cells.split_with_sizes([row.count for row in rows])
    for row, own in zip(rows, found, strict=True):
        p, q = row.shape
        if own[-1] >= p * q:
            raise ValueError(f"{row.name}: its cells go up to {int(own[-1])}: a {p} x {q} matrix has cells 0 to {p * q - 1}")
    return [own.to(torch.int32) for own in found]


def _widths(rows: Sequence[Row]) -> Tensor:
    """Return the width of the remainder of every step, (all components,)."""
    return torch.tensor([row.width for row in rows]).repeat_interleave(torch.tensor([row.count for row in rows]))


def _quotients(data: Tensor, rows: Sequence[Row], start: int) -> Tensor:
    """Read the quotients from the bits behind the remainders: each is that many zeros, followed by a one."""
    bits = (data[start // _BITS :, None] >> torch.arange(_BITS, dtype=torch.uint8) & 1).flatten()[start % _BITS :]
    ones, count = int(bits.sum()), sum(row.count for row in rows)
    if ones < count:
        raise ValueError(f"{_row_at(ones, rows).name}: cells ends before its last one")
    if ones > count:
        raise ValueError(f"{rows[-1].name}: cells has bits behind its last one")
    ends = bits.nonzero().flatten()
    if len(bits) - int(ends[-1]) > _BITS:
        raise ValueError(f"{rows[-1].name}: cells has bytes behind its last one")
    return ends.diff(prepend=ends.new_tensor([-1])) - 1


def _remainders(data: Tensor, widths: Tensor) -> Tensor:
    """Read the remainders from the first bits: as many for each step as its width, the least significant first."""
    begins = widths.cumsum(0) - widths
    padded = torch.cat([data, data.new_zeros(_WINDOW)]).long()
    window = torch.zeros_like(begins)
    for byte in range(_WINDOW):
        window |= padded[begins // _BITS + byte] << _BITS * byte
    return window >> begins % _BITS & (1 << widths) - 1


def _row_at(component: int, rows: Sequence[Row]) -> Row:
    """Return the projection that a component belongs to, given its number among all components."""
    for row in rows:
        if component < row.count:
            return row
        component -= row.count
    raise IndexError(component)
