"""Batches with many components: products over the frequencies.

The spectra S are scattered into dense matrices. Then Delta W = C^T S D, and the gradient is Z = C G D^T, read at the cells and,
for the locations, next to them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from loca_vision.functional.batch_tables import BatchCells, parts_of_table, stacked
from loca_vision.functional.cosine_atoms import slope_steps
from loca_vision.functional.dct import dct2, idct2
from loca_vision.functional.split_products import HALVES, LEFT, RIGHT, TWICE, is_exact, parts, product
from loca_vision.functional.transforms import ordinary_tensors


def matrices(values: Tensor, layout: BatchCells, split: bool) -> Tensor:
    """Return the sums (N, p, q) for values (M,)."""
    (p, q), count = layout.shape, len(layout.counts)
    spectra = values.new_zeros(count * p * q).index_add_(0, layout.flat, values).view(-1, q)
    if not split:
        return idct2(spectra.view(count, p, q))
    half = product(parts(spectra, LEFT, 1), parts_of_table(q, None, RIGHT, 0, values.device)).view(count, p, q)
    left = parts_of_table(p, None, LEFT, 0, values.device)  # one below the other, to be read as columns
    return product(left.mT.expand(count, p, len(left)), parts(half, RIGHT, 1))


def rows(grads: Sequence[Tensor], layout: BatchCells, difference: str | None, like: Tensor, split: bool) -> list[Tensor]:
    """Return z (M,) and, if a difference is given, the slopes along both axes."""
    spectra = _spectra(grads, layout, like, split)
    if difference is None:
        return [spectra.take(layout.flat)]
    shifts, last, weights = _neighbours(layout.shape, difference, like.device, like.dtype)
    near = (layout.cells + shifts).clamp(min=0).minimum(last)
    return list((weights[..., None] * spectra.take(layout.flat_of(near))).sum(1))  # a product might round to TF32


def _spectra(grads: Sequence[Tensor], layout: BatchCells, like: Tensor, split: bool) -> Tensor:
    """Return Z of each gradient, N p q numbers in total."""
    (p, q), count = layout.shape, len(layout.counts)
    if not split:
        return dct2(stacked(grads, None, like))
    exact = is_exact(grads[0])
    left = parts_of_table(p, None, HALVES if exact else LEFT, 1, like.device)
    half = product(left.expand(count, *left.shape), stacked(grads, TWICE if exact else RIGHT, like))
    return product(parts(half.view(-1, q), LEFT, 1), parts_of_table(q, None, RIGHT, 1, like.device).mT)


@lru_cache(maxsize=64)
def _neighbours(
    shape: tuple[int, int], difference: str, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Return steps (5, 1, 2) from a cell, the last cell (2,), and weights (3, 5) that turn Z there into z and both slopes."""
    with ordinary_tensors():
        (one, first), (two, second) = slope_steps(difference)
        steps = torch.tensor([[[0, 0]], [[one, 0]], [[two, 0]], [[0, one]], [[0, two]]], device="cpu")
        weights = torch.tensor([[1, 0, 0, 0, 0], [0, first, second, 0, 0], [0, 0, 0, first, second]], dtype=dtype, device="cpu")
        return steps.to(device), torch.tensor(shape, device="cpu").sub(1).to(device), weights.to(device)
