"""Locations of components: draw them at random, find their cells, and draw cells without repetition."""

from __future__ import annotations

import torch
from torch import Tensor

# The share of a cell's width over which an initial location is spread around the centre: less than 1, so that float32
# cannot round the location into the neighbouring cell.
_JITTER = 0.99


def random_locations(shape: tuple[int, int], count: int, generator: torch.Generator) -> Tensor:
    """Return (B, 2) float32 locations in distinct cells, each cell equally likely.

    Each location lies somewhere within its cell rather than at the centre, so that some are about to cross into the next
    cell and others are not.
    """
    return jittered(distinct(count, shape[0] * shape[1], generator), shape, generator)


def jittered(flat: Tensor, shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Return (B, 2) float32 locations at random places within the flat cells row * q + column (B,)."""
    jitter = (torch.rand(len(flat), 2, generator=generator, dtype=torch.float32) - 0.5) * _JITTER
    locations = cell_locations(flat, shape) + jitter / torch.tensor(shape).sub(1).clamp(min=1)
    return locations.clamp(0, 1)


def cells_at(locations: Tensor, shape: tuple[int, int]) -> Tensor:
    """Return the (B, 2) int64 cells nearest to locations (B, 2) in [0, 1]."""
    inside = locations.detach().nan_to_num(0).clamp(0, 1)
    return torch.stack([(inside[:, axis] * (size - 1)).round().long() for axis, size in enumerate(shape)], 1)


def by_cell(values: Tensor, cells: Tensor) -> Tensor:
    """Return, for each distinct cell among the cells (B, 2), the sum of the values (B,) at it."""
    different, where = torch.unique(cells, dim=0, return_inverse=True)
    return values.new_zeros(len(different)).index_add(0, where, values)


def cell_locations(flat: Tensor, shape: tuple[int, int]) -> Tensor:
    """Return (B, 2) float32 locations in [0, 1] at the centres of the flat cells row * q + column (B,)."""
    cells = torch.stack([flat // shape[1], flat % shape[1]], 1)
    return cells.to(torch.float32) / torch.tensor(shape, device=flat.device).sub(1).clamp(min=1)


def distinct(count: int, total: int, generator: torch.Generator) -> Tensor:
    """Draw `count` distinct integers from 0 to `total` - 1 in random order, with memory proportional to `count`."""
    if 2 * count > total:
        return torch.randperm(total, generator=generator)[:count]
    drawn = torch.empty(0, dtype=torch.long)
    while len(drawn) < count:
        more = torch.randint(total, (count + 16,), generator=generator)
        drawn = torch.unique(torch.cat([drawn, more]))
    return drawn[torch.randperm(len(drawn), generator=generator)[:count]]
