"""A sum of cosine atoms as autograd sees it: its numbers, and what its gradient asks of the loss (LoCA, Eq. 3 to 5).

With G the gradient of the update and Z = C G D^T its spectrum, everything follows from Z at the components' cells and, while
these move, at the cells beside them. How Z is found there is somebody else's business.
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
    """What of a sum of cosines is no tensor.

    Attributes:
        shape: (p, q) of the matrix.
        scale: alpha.
        difference: "central", "forward" or "backward", how the slope along an axis is estimated.
    """

    shape: tuple[int, int]
    scale: float
    difference: str


class Cells:
    """Cells of a matrix, and what follows from them, worked out once for as long as nothing moves.

    Args:
        cells: (B, 2) int64, row u in [0, p - 1] and column v in [0, q - 1]; nobody changes them any more.
        shape: (p, q).
    """

    def __init__(self, cells: Tensor, shape: tuple[int, int]) -> None:
        self.cells, self.shape = cells, shape
        self._known: dict[Any, Any] = {}

    def once(self, work: Callable[..., _T], *arguments: Any) -> _T:
        """`work(cells, shape, *arguments)`, from memory the second time."""
        key = (work, *arguments)
        if key not in self._known:
            self._known[key] = work(self.cells, self.shape, *arguments)
        found: _T = self._known[key]
        return found


@dataclass(frozen=True)
class Cosines:
    """scale * sum_k a_k C[u_k]^T D[v_k].

    Attributes:
        coefficients: (B,) float32 or float64, the amplitudes a.
        locations: (B, 2) in [0, 1], from which the cells were rounded.
        layout: the cells (B, 2).
        form: shape, scale and difference.
    """

    coefficients: Tensor
    locations: Tensor
    layout: Cells
    form: AtomSettings


def offsets(difference: str, learned: bool, moving: bool) -> list[Offset]:
    """Where Z is asked for: at the cells for the coefficients, beside them for the locations, nowhere twice."""
    steps = [step for step, _ in _STEPS[difference]] if moving else []
    beside = [(step, 0) for step in steps] + [(0, step) for step in steps]
    return list(dict.fromkeys([(0, 0)] * learned + beside))


def shifted(cells: Tensor, offset: Offset, shape: tuple[int, int]) -> Tensor:
    """Cells (B, 2) moved by an offset; beyond the border the border cell itself stands in."""
    places = [axis if not step else (axis + step).clamp(0, n - 1) for axis, step, n in zip(cells.T, offset, shape, strict=True)]
    return torch.stack(places, 1)


def row_major(cells: Tensor, shape: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Cells (B, 2) as a compressed sparse matrix has them: their order (B,), where rows begin (p + 1,), and columns (B,)."""
    order = (cells[:, 0] * shape[1] + cells[:, 1]).argsort()
    rows, cols = cells[order].T
    starts = torch.searchsorted(rows.contiguous(), torch.arange(shape[0] + 1, device=cells.device))
    return order, starts, cols.contiguous()


def coefficient_gradient(z: Mapping[Offset, Tensor], form: AtomSettings) -> Tensor:
    """(B,) from the values (B,) of Z at each of the `offsets`: exact."""
    return form.scale * z[0, 0]


def location_gradient(z: Mapping[Offset, Tensor], coefficients: Tensor, form: AtomSettings) -> Tensor:
    """(B, 2): what one cell's step of a component changes the loss by, times the number of cells from 0 to 1."""
    steps = _STEPS[form.difference]
    axes = [[weight * z[step, 0] for step, weight in steps], [weight * z[0, step] for step, weight in steps]]
    slopes = [(size - 1) * (first + second) for size, (first, second) in zip(form.shape, axes, strict=True)]
    return form.scale * coefficients[:, None] * torch.stack(slopes, 1)
