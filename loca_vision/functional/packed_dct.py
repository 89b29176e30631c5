"""Cosine transforms of vectors (n, q) with one row per frequency, the layout that sparse spectra multiply and read.

This is Makhoul's transform as in `dct.py`, which computes X[k] and -X[q - k] as the real and imaginary part of one FFT output.
Here the two stay next to each other, as rows 2 k and 2 k + 1 of (q', n) with q' = 2 (q // 2 + 1), and code that multiplies or
reads rows finds each frequency through `packed_rows`. This saves passes over the numbers, where such a transform spends its
time.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from loca_vision.functional.dct import fft_plan, matrix_for
from loca_vision.functional.transforms import ordinary_tensors

# Numbers that each thread transforms at a time, so that intermediate results stay in a core's own cache.
_NUMBERS_AT_ONCE = 3 * 2**15
_LEAST_VECTORS, _MOST_VECTORS = 32, 512
# Bytes of a cache line. If rows are an even number of lines long, the numbers of a column compete for the same cache sets.
_LINE = 64


def rows_for(n: int) -> int:
    """Return the number of rows for the frequencies of vectors of length n."""
    return 2 * (n // 2 + 1)


def packed_rows(frequency: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Return the row that holds each of the frequencies (B,) of vectors of length n, and its sign."""
    lower = frequency <= n // 2
    return torch.where(lower, 2 * frequency, 2 * (n - frequency) + 1), torch.where(lower, 1.0, -1.0)


def pieces(count: int, width: int, threads: int) -> list[tuple[int, int]]:
    """Return start and end of each piece of `count` vectors of length `width`, sized for `threads` threads to share."""
    wished = min(max(threads * _NUMBERS_AT_ONCE // width, _LEAST_VECTORS), _MOST_VECTORS)
    at_once = -(-count // max(1, round(count / wished)) // 16) * 16 if count else 16  # no short rest, and whole cache lines
    return [(start, min(start + at_once, count)) for start in range(0, count, at_once)]


def frequencies(x: Tensor) -> Tensor:
    """Return the DCT-II of the rows of x (n, q), float32 or float64, as (q', n)."""
    return _turned_round(packed(x))


def packed(x: Tensor) -> Tensor:
    """Return the same as `frequencies`, as (n, q')."""
    order, twiddle = fft_plan(x.shape[1], x.device, x.dtype)
    return torch.view_as_real(torch.fft.rfft(_split(x, order)).mul_(twiddle)).flatten(1)


def add_samples(y: Tensor, spectrum: Tensor) -> None:
    """Add the inverse transform of `spectrum` (p', n) to the rows of y (n, p), in place.

    Rows 1 and, for even p, p + 1 hold no frequency and must be zero.
    """
    add_unpacked(y, _turned_round(spectrum))


def add_unpacked(y: Tensor, spectrum: Tensor) -> None:
    """Do the same as `add_samples` for a contiguous spectrum (n, p'), which is overwritten."""
    n, order = y.shape[1], fft_plan(y.shape[1], y.device, y.dtype)[0]
    turned = torch.view_as_complex(spectrum.view(len(y), -1, 2))
    samples = torch.fft.irfft(turned.mul_(_inverse_twiddle(n, y.device, y.dtype)), n)
    if _alone(y):
        y.index_add_(1, order, samples)
    else:
        half = (n + 1) // 2
        y[:, 0::2].add_(samples[:, :half])
        y[:, 1::2].add_(samples[:, half:].flip(1))


def empty_spectrum(rows: int, n: int, like: Tensor) -> Tensor:
    """Return an uninitialised (rows, n) tensor for a product to be written to, laid out so that transposing it is fast."""
    numbers = _LINE // like.element_size()
    lines = -(-n // numbers)
    return like.new_empty(rows, (lines | 1) * numbers)[:, :n]


@lru_cache(maxsize=64)
def basis_pieces(n: int, width: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Return the frequencies (n', m) of the n unit vectors, in the `pieces` of one thread for vectors of length `width`."""
    with ordinary_tensors():
        row, sign = packed_rows(torch.arange(n, device=device), n)
        basis = torch.zeros(rows_for(n), n, dtype=dtype, device=device)
        basis[row] = sign[:, None].to(dtype) * matrix_for(n, device, dtype)
        return tuple(basis[:, start:end].contiguous() for start, end in pieces(n, width, 1))


@lru_cache(maxsize=64)
def _inverse_twiddle(n: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return the inverse of `fft_plan`'s rotation; for even n, X[n / 2] is stored once, and its factor compensates for that."""
    with ordinary_tensors():
        angle = torch.arange(n // 2 + 1, dtype=torch.float64, device="cpu") * (math.pi / (2 * n))
        twiddle = torch.polar(torch.full_like(angle, math.sqrt(n / 2)), angle)
        twiddle[0] = math.sqrt(n)
        if n % 2 == 0:
            twiddle[n // 2] = math.sqrt(n)
        return twiddle.to(device=device, dtype=torch.complex128 if dtype == torch.float64 else torch.complex64)


def _alone(x: Tensor) -> bool:
    """Whether a single thread computes, in which case indexed copies are fastest; they do not use more threads."""
    return x.device.type == "cpu" and torch.get_num_threads() == 1


def _split(x: Tensor, order: Tensor) -> Tensor:
    """Return even samples forward, then odd ones backward."""
    if _alone(x):
        return x.index_select(1, order)
    return torch.cat([x[:, 0::2], x[:, 1::2].flip(1)], 1)


def _turned_round(x: Tensor) -> Tensor:
    """Return x^T, contiguous; with a third axis, because torch copies two-axis transposes more slowly, on a single thread."""
    return x.T[None].contiguous()[0]
