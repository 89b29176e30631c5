"""The orthonormal discrete cosine transform, DCT-II, and its inverse, DCT-III (Ahmed, Natarajan and Rao, 1974).

`scipy.fft.dctn(x, type=2, norm="ortho")` is the same transform. There are two implementations: a product with the cosine
matrix, and Makhoul's (1980) with one real FFT of the same length. Both are exact up to rounding; `auto` selects the cheaper.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from loca_vision.functional.transforms import ordinary_tensors

Method = Literal["auto", "matrix", "fast"]

# From this length on, one FFT with its permutation and twiddles beats the product with an n x n matrix, in float32. CPU: two
# cores, 512 x 512: 0.4 to 0.8 ms against 0.9; 1280 x 1280: 2.4 to 4.4 ms against 12. Elsewhere: an H200, 24 matrices at once,
# 512 x 512: 0.19 to 0.30 ms against 0.20; 640 x 640: 0.21 to 0.34 against 0.36; 1280 x 1280: 0.7 to 1.2 against 2.1. For only a
# few vectors, the operations that such a transform launches are not worth their cost.
_FAST_FROM = {"cpu": 512}
_FAST_FROM_ELSEWHERE, _MANY_ELSEWHERE = 640, 2**13
# Numbers that a fast transform processes at a time: few enough for a core's own cache, where its passes cost a third. Columns
# come in multiples of what FFT libraries process together, so that the pieces round like the whole.
_NUMBERS_AT_ONCE, _COLUMNS = 2**17, 64
# From this length on, FFTs along the columns lose more time to cache misses than transposing the matrix twice costs.
_TURN_FROM = 1024


def dct_matrix(n: int, *, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the orthonormal DCT-II matrix of LoCA, Eq. 2: row i is the cosine of frequency i, sampled at n points.

    Args:
        n: the length of the transform, at least 1.
        device, dtype: the device and dtype of the result. The matrix is built in float64 and rounded once, because float32
            cosines of large arguments would not be orthonormal (errors of 2e-5 at n = 768, 2e-4 at n = 4096).

    Returns:
        (n, n) tensor M with M @ M.T = identity; `M @ x` is the DCT of x, and `M.T @ y` is the inverse DCT of y.

    Raises:
        ValueError: n is not a positive integer.
    """
    if not isinstance(n, int) or isinstance(n, bool) or n < 1:
        raise ValueError(f"n={n!r}: expected a whole number from 1 up")
    return matrix_for(n, torch.device(device or "cpu"), dtype).clone()


def dct(x: Tensor, dim: int = -1, *, method: Method = "auto") -> Tensor:
    """Return the orthonormal DCT-II of `x` along `dim`, in the same shape.

    Half precision is computed in float32 and rounded once.
    """
    return _transform(x, dim, method, inverse=False)


def idct(x: Tensor, dim: int = -1, *, method: Method = "auto") -> Tensor:
    """Return the orthonormal DCT-III of `x` along `dim`, the inverse of `dct`, in the same shape."""
    return _transform(x, dim, method, inverse=True)


def dct2(x: Tensor, *, method: Method = "auto") -> Tensor:
    """Return the 2-D DCT-II over the last two axes, C X D^T: (..., p, q) to (..., p, q)."""
    return dct(dct(x, -1, method=method), -2, method=method)


def idct2(x: Tensor, *, method: Method = "auto") -> Tensor:
    """Return the inverse 2-D DCT over the last two axes, C^T S D: (..., p, q) to (..., p, q)."""
    return idct(idct(x, -1, method=method), -2, method=method)


def _transform(x: Tensor, dim: int, method: Method, *, inverse: bool) -> Tensor:
    if method not in ("auto", "matrix", "fast"):
        raise ValueError(f"method={method!r}: expected 'auto', 'matrix' or 'fast'")
    if not x.is_floating_point():
        raise TypeError(f"x has dtype {x.dtype}: a cosine transform needs a real floating-point tensor")
    n = x.shape[dim]
    if n == 0:
        raise ValueError(f"x has shape {tuple(x.shape)}: the transformed axis {dim} is empty")
    if method == "auto":
        method = "fast" if _is_fast(n, x.numel() // n, x.device) else "matrix"
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if method == "matrix":
        return _bymatrix_for(wide, dim, inverse).to(x.dtype)
    return _by_pieces(wide, dim, inverse).to(x.dtype)


def _is_fast(n: int, vectors: int, device: torch.device) -> bool:
    """Whether "auto" selects the FFT for this many vectors of this length."""
    if device.type in _FAST_FROM:
        return n >= _FAST_FROM[device.type]
    return n >= _FAST_FROM_ELSEWHERE and vectors >= min(_MANY_ELSEWHERE, 2**23 // n)


def _pieces(count: int, n: int) -> list[tuple[int, int]]:
    """Return where pieces of `count` transforms of length n begin and end; a short remainder joins the previous piece."""
    at_once = max(1, _NUMBERS_AT_ONCE // n // _COLUMNS) * _COLUMNS
    ends = [*range(at_once, count - _COLUMNS, at_once), count] if count else []
    return list(zip([0, *ends], ends, strict=False))


def _by_pieces(x: Tensor, dim: int, inverse: bool) -> Tensor:
    """Compute the fast transform piece by piece, each piece being some rows, or some columns of a matrix."""
    n = x.shape[dim]
    down = x.dim() == 2 and dim in (0, -2)
    if down and n >= _TURN_FROM:
        return _by_pieces(x.T.contiguous(), 1, inverse).T.contiguous()
    flat = x if down else x.movedim(dim, -1).reshape(-1, n)
    form = _by_inverse_fft if inverse else _by_fft
    result = torch.empty_like(flat, memory_format=torch.contiguous_format)
    count = flat.shape[int(down)]
    for start, end in _pieces(count, n) if x.device.type == "cpu" else [(0, count)] * bool(count):
        part, out = (whole.narrow(int(down), start, end - start) for whole in (flat, result))
        form(part, out, int(not down))
    return result if down else result.view(x.movedim(dim, -1).shape).movedim(-1, dim)


def _bymatrix_for(x: Tensor, dim: int, inverse: bool) -> Tensor:
    matrix = matrix_for(x.shape[dim], x.device, x.dtype)
    matrix = matrix.T if inverse else matrix
    if x.dim() > 1 and dim % x.dim() == x.dim() - 2:
        return matrix @ x
    return (x.movedim(dim, -1) @ matrix.T).movedim(-1, dim)


def _by_fft(x: Tensor, out: Tensor, dim: int) -> None:
    """Makhoul's transform: even samples forward, odd ones backward, one rfft and one rotation by a quarter sample.

    With W = FFT(v) * twiddle, X[k] = Re W[k] and X[n-k] = -Im W[k].
    """
    n = x.shape[dim]
    order, twiddle = fft_plan(n, x.device, x.dtype)
    turned = torch.fft.rfft(x.index_select(dim, order), dim=dim).mul_(_along(twiddle, dim))
    half = n // 2 + 1
    out.narrow(dim, 0, half).copy_(turned.real)
    out.narrow(dim, half, n - half).copy_(turned.imag.narrow(dim, 1, n - half).flip(dim).neg_())


def _by_inverse_fft(x: Tensor, out: Tensor, dim: int) -> None:
    n = x.shape[dim]
    half = n // 2 + 1
    _, twiddle = fft_plan(n, x.device, x.dtype)
    mirrored = torch.cat([torch.zeros_like(x.narrow(dim, 0, 1)), x.narrow(dim, n - half + 1, half - 1).flip(dim)], dim)
    turned = torch.complex(x.narrow(dim, 0, half), mirrored.neg_()) / _along(twiddle, dim)
    samples = torch.fft.irfft(turned, n, dim=dim)
    even, odd = (n + 1) // 2, n // 2
    out.movedim(dim, 0)[0::2].copy_(samples.narrow(dim, 0, even).movedim(dim, 0))
    out.movedim(dim, 0)[1::2].copy_(samples.narrow(dim, even, odd).flip(dim).movedim(dim, 0))


def _along(values: Tensor, dim: int) -> Tensor:
    """Shape a vector so that it broadcasts along the first or the second axis of a matrix."""
    return values if dim else values[:, None]


@lru_cache(maxsize=64)
def matrix_for(n: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    # Outside inference mode, so that a matrix created during inference can be used in a later training step.
    with ordinary_tensors():
        step = torch.arange(n, dtype=torch.float64, device="cpu")
        matrix = torch.cos(math.pi / (2 * n) * torch.outer(step, 2 * step + 1)) * math.sqrt(2 / n)
        matrix[0] /= math.sqrt(2)
        return matrix.to(device=device, dtype=dtype)


@lru_cache(maxsize=64)
def fft_plan(n: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the order of the samples, and the scaled rotation exp(-i pi k / 2n) for the lower half of the spectrum."""
    with ordinary_tensors():
        order = torch.cat([torch.arange(0, n, 2, device="cpu"), torch.arange(1, n, 2, device="cpu").flip(0)])
        angle = torch.arange(n // 2 + 1, dtype=torch.float64, device="cpu") * (-math.pi / (2 * n))
        twiddle = torch.polar(torch.full_like(angle, math.sqrt(2 / n)), angle)
        twiddle[0] /= math.sqrt(2)
        complex_dtype = torch.complex128 if dtype == torch.float64 else torch.complex64
        return order.to(device), twiddle.to(device=device, dtype=complex_dtype)
