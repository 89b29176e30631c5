"""The spectrum of a weight's gradient at few cells, from the activations, without forming the gradient.

The gradient of y = x W^T is G = dY^T X, summed over n tokens, and its spectrum Z = C G D^T = (dY C^T)^T (X D^T). Where Z is
asked for at few cells, the two factors can be transformed token by token, O(n (p + q) log), and each cell is then one dot
product of n numbers. The whole product would cost O(n p q).
"""

from __future__ import annotations

import torch
from torch import Tensor

from loca_vision.cosines import Layout, Offset, row_major, shifted
from loca_vision.dct import fft_plan
from loca_vision.paths import tokens_at_once


def spectra_at(x: Tensor, grads: list[Tensor], layouts: list[Layout], places: list[list[Offset]]) -> list[dict[Offset, Tensor]]:
    """Values of Z = C (dY^T X) D^T at cells and beside them.

    Args:
        x: (n, q) activations.
        grads: (n, p) gradients dY of one or more outputs of x; the transform of x is shared by all of them.
        layouts: for each of these the cells (B, 2) of a matrix (p, q).
        places: for each the offsets from its cells.

    Returns:
        For each and for each of its places (B,) values, in float32 or, where x is float64, in that.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    sums = [{place: _Sums(layout, place, dtype) for place in wanted} for layout, wanted in zip(layouts, places, strict=True)]
    step = tokens_at_once(max(x.shape[1], *(grad.shape[1] for grad in grads)))
    for start in range(0, len(x), step):
        right = _by_frequency(x[start : start + step].to(dtype))
        for grad, parts in zip(grads, sums, strict=True):
            left = _by_frequency(grad[start : start + step].to(dtype))
            for part in parts.values():
                part.add(left, right)
    return [{place: part.values() for place, part in parts.items()} for parts in sums]


def _by_frequency(x: Tensor) -> Tensor:
    """DCT-II of the rows of x (n, q), with a row for each frequency: (2 (q // 2 + 1), n), up to order and sign.

    It is Makhoul's transform as in `dct.py`, which finds X[k] and -X[q - k] as real and imaginary part of one number. Here they
    stay side by side, which makes rows 2 k and 2 k + 1 and spares two passes; `_places` says where each frequency is.
    """
    order, twiddle = fft_plan(x.shape[1], x.device, x.dtype)
    turned = torch.fft.rfft(x.index_select(1, order)).mul_(twiddle)
    return torch.view_as_real(turned).flatten(1).T.contiguous()


def _places(frequency: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The row of `_by_frequency` that holds each of the frequencies (B,), and its sign."""
    lower = frequency <= n // 2
    return torch.where(lower, 2 * frequency, 2 * (n - frequency) + 1), torch.where(lower, 1.0, -1.0)


def _sampled_places(cells: Tensor, shape: tuple[int, int], place: Offset) -> tuple[tuple[Tensor, ...], Tensor]:
    """Where values at cells, or beside them, are between two results of `_by_frequency`: compressed, and the signs (B,)."""
    moved = shifted(cells, place, shape)
    (rows, row_signs), (cols, col_signs) = (_places(moved[:, axis], n) for axis, n in enumerate(shape))
    return row_major(torch.stack([rows, cols], 1), _size(shape)), row_signs * col_signs


def _size(shape: tuple[int, int]) -> tuple[int, int]:
    return 2 * (shape[0] // 2 + 1), 2 * (shape[1] // 2 + 1)


class _Sums:
    """Sums over tokens at some cells: a sparse matrix that has these cells and no others."""

    def __init__(self, layout: Layout, place: Offset, dtype: torch.dtype) -> None:
        (self.order, starts, cols), self.signs = layout.once(_sampled_places, place)
        zeros = torch.zeros(len(cols), dtype=dtype, device=cols.device)
        self.matrix = torch.sparse_csr_tensor(starts, cols, zeros, _size(layout.shape), check_invariants=False)

    def add(self, left: Tensor, right: Tensor) -> None:
        torch.sparse.sampled_addmm(self.matrix, left, right.T, out=self.matrix)

    def values(self) -> Tensor:
        found = self.matrix.values()
        return torch.empty_like(found).index_copy_(0, self.order, found).mul_(self.signs)
