"""The spectrum of a weight's gradient at few cells, from the activations, without forming the gradient.

The gradient of y = x W^T is G = dY^T X, summed over n tokens, and its spectrum Z = C G D^T = (dY C^T)^T (X D^T). Where Z is
asked for at few cells, the two factors can be transformed token by token, O(n (p + q) log), and each cell is then one dot
product of n numbers. The whole product would cost O(n p q).
"""

from __future__ import annotations

import torch
from torch import Tensor

from loca_vision.dct import fft_plan
from loca_vision.paths import tokens_at_once


def spectra_at(x: Tensor, grads: list[Tensor], cells: list[list[Tensor]]) -> list[list[Tensor]]:
    """Values of C (dY^T X) D^T at cells.

    Args:
        x: (n, q) activations, n from 1 up.
        grads: (n, p) gradients dY of one or more outputs of x; the transform of x is shared by all of them.
        cells: for each of these, any number of lists of cells (B, 2) int64.

    Returns:
        For each of the lists (B,) values, in float32 or, where x and dY are float64, in that.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    sums = [
        [_CellSums(part, (grad.shape[1], x.shape[1]), dtype) for part in parts]
        for grad, parts in zip(grads, cells, strict=True)
    ]
    step = tokens_at_once(max(x.shape[1], *(grad.shape[1] for grad in grads)))
    for start in range(0, len(x), step):
        right = _by_frequency(x[start : start + step].to(dtype))
        for grad, parts in zip(grads, sums, strict=True):
            left = _by_frequency(grad[start : start + step].to(dtype))
            for part in parts:
                part.add(left, right)
    return [[part.values() for part in parts] for parts in sums]


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


class _CellSums:
    """Sums over tokens at some cells: a sparse matrix with the cells' places as its pattern."""

    def __init__(self, cells: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> None:
        (rows, row_signs), (cols, col_signs) = (_places(cells[:, axis], n) for axis, n in enumerate(shape))
        self.signs = (row_signs * col_signs).to(dtype)
        sizes = [2 * (n // 2 + 1) for n in shape]
        self.order = rows.argsort()  # equal rows one after the other, so that a row stays in the cache
        starts = torch.searchsorted(rows[self.order], torch.arange(sizes[0] + 1, device=cells.device))
        self.matrix = torch.sparse_csr_tensor(
            starts, cols[self.order], torch.zeros_like(self.signs), sizes, check_invariants=False
        )

    def add(self, left: Tensor, right: Tensor) -> None:
        torch.sparse.sampled_addmm(self.matrix, left, right.T, out=self.matrix)

    def values(self) -> Tensor:
        found = self.matrix.values()
        return torch.empty_like(found).index_copy_(0, self.order, found).mul_(self.signs)
