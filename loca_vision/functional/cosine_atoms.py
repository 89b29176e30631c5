"""A sum of cosine atoms as autograd sees it: its tensors, and its gradient (LoCA, Eq. 3 to 5).

With G the gradient of the update and Z = C G D^T its spectrum, everything follows from Z at the components' cells and, while
these move, at the neighbouring cells. Other modules compute Z there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

_T = TypeVar("_T")
Offset = tuple[int, int]  # rows and columns from a component's own cell

_STEPS = {"central": ((1, 0.5), (-1, -0.5)), "forward": ((1, 1.0), (0, -1.0)), "backward": ((0, 1.0), (-1, -1.0))}


@dataclass(frozen=True)
class AtomSettings:
    """The settings of a sum of cosines.

    Attributes:
        shape: (p, q) of the matrix.
        scale: alpha.
        difference: how the slope along an axis is estimated: "central", "forward" or "backward".
    """

    shape: tuple[int, int]
    scale: float
    difference: str


class Cells:
    """Cells of a matrix, with a cache of what is computed from them, which is valid as long as nothing moves.

    Args:
        cells: (B, 2) int64, row u in [0, p - 1] and column v in [0, q - 1]; must not be changed afterwards.
        shape: (p, q).
    """

    def __init__(self, cells: Tensor, shape: tuple[int, int]) -> None:
        self.cells, self.shape = cells, shape
        self._known: dict[Any, Any] = {}

    def once(self, work: Callable[..., _T], *arguments: Any) -> _T:
        """Return `work(cells, shape, *arguments)`, cached from the first call."""
        key = (work, *arguments)
        if key not in self._known:
            self._known[key] = work(self.cells, self.shape, *arguments)
        result: _T = self._known[key]
        return result


@dataclass(frozen=True)
class Cosines:
    """The sum scale * sum_k a_k C[u_k]^T D[v_k].

    Attributes:
        coefficients: (B,) float32 or float64, the amplitudes a.
        locations: (B, 2) in [0, 1], which were rounded to the cells.
        layout: the cells (B, 2).
        settings: shape, scale and difference.
    """

    coefficients: Tensor
    locations: Tensor
    layout: Cells
    settings: AtomSettings


def slope_steps(difference: str) -> tuple[tuple[int, float], ...]:
    """Return the steps from a component's own cell, with weights, whose weighted sum of Z is the slope along an axis."""
    return _STEPS[difference]


def offsets(difference: str, learned: bool, moving: bool) -> list[Offset]:
    """Return the offsets at which Z is needed: the cells for coefficients, their neighbours for locations, each once."""
    steps = [step for step, _ in _STEPS[difference]] if moving else []
    neighbours = [(step, 0) for step in steps] + [(0, step) for step in steps]
    return list(dict.fromkeys([(0, 0)] * learned + neighbours))


def shifted(cells: Tensor, offset: Offset, shape: tuple[int, int]) -> Tensor:
    """Return cells (B, 2) moved by an offset; cells beyond the border are replaced with the border cell."""
    moved = [axis if not step else (axis + step).clamp(0, n - 1) for axis, step, n in zip(cells.T, offset, shape, strict=True)]
    return torch.stack(moved, 1)


def row_major(cells: Tensor, shape: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Return cells (B, 2) in CSR form: their order (B,), the start of each row (p + 1,), and columns (B,)."""
    order = (cells[:, 0] * shape[1] + cells[:, 1]).argsort()
    rows, cols = cells[order].T
    starts = torch.searchsorted(rows.contiguous(), torch.arange(shape[0] + 1, device=cells.device))
    return order, starts, cols.contiguous()


def coefficient_gradient(z: Mapping[Offset, Tensor], settings: AtomSettings) -> Tensor:
    """Return the exact gradient (B,) of the coefficients from the values (B,) of Z at each of the `offsets`."""
    return settings.scale * z[0, 0]


def location_gradient(z: Mapping[Offset, Tensor], coefficients: Tensor, settings: AtomSettings) -> Tensor:
    """Return (B, 2), the change of the loss if a component moved by one cell, times the number of cells from 0 to 1."""
    steps = _STEPS[settings.difference]
    axes = [[weight * z[step, 0] for step, weight in steps], [weight * z[0, step] for step, weight in steps]]
    slopes = [(size - 1) * (first + second) for size, (first, second) in zip(settings.shape, axes, strict=True)]
    return settings.scale * coefficients[:, None] * torch.stack(slopes, 1)
