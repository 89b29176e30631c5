"""The inputs for computing batches of spectra: their cells, their gradients, and constant matrices."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from loca_vision.functional.cosine_atoms import shifted, slope_steps
from loca_vision.functional.dct import matrix_for
from loca_vision.functional.split_products import LEFT, Pattern, is_exact, parts
from loca_vision.functional.transforms import ordinary_tensors


class BatchCells:
    """The cells of N spectra of one shape, M in all.

    Args:
        cells: (M, 2) int64, row u in [0, p - 1] and column v in [0, q - 1], one spectrum after the other.
        counts: the number of components of each spectrum.
        shape: (p, q).
    """

    def __init__(self, cells: Tensor, counts: Sequence[int], shape: tuple[int, int]) -> None:
        self.cells, self.counts, self.shape = cells, list(counts), shape

    @cached_property
    def flat(self) -> Tensor:
        """The positions (M,) of the cells in (N, p, q)."""
        return self.flat_of(self.cells)

    def flat_of(self, cells: Tensor) -> Tensor:
        """Return the positions (..., M) of cells (..., M, 2) in (N, p, q)."""
        starts = _starts(tuple(self.counts), math.prod(self.shape), cells.device)
        return torch.add(starts + cells[..., 1], cells[..., 0], alpha=self.shape[1])

    @cached_property
    def rows_in_parts(self) -> Tensor:
        """The rows (N, 3 B) of the cells in a table of `HALVES` stacked vertically, in the order of `LEFT`.

        All spectra must have the same number of components B.
        """
        shifts = _shifts(LEFT, self.shape[0], self.cells.device)
        return (self.cells[:, 0].view(len(self.counts), 1, -1) + shifts).flatten(1)


@lru_cache(maxsize=64)
def _starts(counts: tuple[int, ...], size: int, device: torch.device) -> Tensor:
    """Return (M,) positions at which each component's spectrum starts in the batch."""
    with ordinary_tensors():
        starts = torch.arange(len(counts), device="cpu") * size
        return starts.repeat_interleave(torch.tensor(counts, device="cpu")).to(device)


@lru_cache(maxsize=64)
def _shifts(pattern: Pattern, length: int, device: torch.device) -> Tensor:
    with ordinary_tensors():
        return (torch.tensor(pattern, device="cpu") * length)[:, None].to(device)


def stacked(grads: Sequence[Tensor], pattern: Pattern | None, like: Tensor) -> Tensor:
    """Stack gradients (p, q) to (N, p, q) in the dtype of `like`, or their `parts` to (N, K p, q)."""
    if pattern is None:
        return torch.stack(list(grads)).to(like.dtype)
    if is_exact(grads[0]):
        return torch.stack([grad for grad in grads for _ in pattern]).view(len(grads), -1, grads[0].shape[1])
    return parts(torch.stack(list(grads)).float(), pattern, 1)


def table(n: int, difference: str | None, like: Tensor) -> Tensor:
    """Return the (n, n) DCT matrix or, if a difference is given, the slope at each row, estimated from neighbouring rows."""
    return matrix_for(n, like.device, like.dtype) if difference is None else _slopes(n, difference, like.device, like.dtype)


@lru_cache(maxsize=64)
def _slopes(n: int, difference: str, device: torch.device, dtype: torch.dtype) -> Tensor:
    with ordinary_tensors():
        wide, own = matrix_for(n, torch.device("cpu"), torch.float64), torch.arange(n, device="cpu")
        cells = torch.stack([own, torch.zeros_like(own)], 1)
        (one, first), (two, second) = slope_steps(difference)
        after, before = (wide[shifted(cells, (step, 0), (n, 1))[:, 0]] for step in (one, two))
        return (first * after + second * before).to(device=device, dtype=dtype)


@lru_cache(maxsize=64)
def parts_of_table(n: int, difference: str | None, pattern: Pattern, dim: int, device: torch.device) -> Tensor:
    """Return the `parts` of a float32 `table`."""
    with ordinary_tensors():
        return parts(table(n, difference, torch.empty(0, dtype=torch.float32, device=device)), pattern, dim)
