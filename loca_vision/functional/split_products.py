"""Float32 products on tensor cores: an operand is the sum of two bfloat16 parts, and three of four products are added up.

The parts hold 16 of float32's 24 bits, and the product of the two small ones is left out: the relative error is 1e-5, that of
float32 products 5e-7. On an H200 they take a quarter of the time.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

# Which parts of an operand stand one after the other: 0 is the operand rounded, 1 what rounding left over.
Pattern = tuple[int, ...]
LEFT, RIGHT = (0, 0, 1), (0, 1, 0)  # these two meet
HALVES, TWICE = (0, 1), (0, 0)  # and these, where the second is an operand that bfloat16 holds exactly


def parts(x: Tensor, pattern: Pattern, dim: int) -> Tensor:
    """Parts of x in bfloat16, one after the other along `dim`, which becomes as many times longer."""
    dim %= x.dim()
    result = x.new_empty(*x.shape[:dim], len(pattern), *x.shape[dim:], dtype=torch.bfloat16)
    places = [result.select(dim, i) for i in range(len(pattern))]
    rounded = places[0].copy_(x)
    for part, place in zip(pattern[1:], places[1:], strict=True):
        if part:
            torch.sub(x, rounded, out=place)
        else:
            place.copy_(rounded)
    return result.flatten(dim, dim + 1)


def is_exact(x: Tensor) -> bool:
    """Whether the operand is its own bfloat16 part, with nothing left over."""
    return x.dtype == torch.bfloat16


def product(left: Tensor, right: Tensor) -> Tensor:
    """(..., m, k) times (..., k, n), of parts along k; accumulated in float32, and float32."""
    if left.device.type == "cpu":  # which has no product of bfloat16 numbers with a float32 result
        return left.float() @ right.float()
    multiply = torch.mm if left.dim() == 2 else torch.bmm
    return multiply(left, right, out_dtype=torch.float32)


def is_preferred(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether products for activations of this dtype are computed so.

    They are where activations are rounded more coarsely anyway, and where `torch.set_float32_matmul_precision` allows less than
    the highest precision: otherwise TF32 would be taken then, whose error is 4e-4.
    """
    return _is_possible(device) and (dtype.itemsize < 4 or _allows_tf32())


def _allows_tf32() -> bool:
    try:
        return torch.get_float32_matmul_precision() != "highest"
    except RuntimeError:  # torch 2.9 and later refuse to tell once `torch.backends.*.fp32_precision` has been set
        return str(torch.backends.cuda.matmul.fp32_precision) == "tf32"


@lru_cache(maxsize=8)
def _is_possible(device: torch.device) -> bool:
    """Products of bfloat16 numbers with a float32 result came with torch 2.8, for CUDA only."""
    if device.type != "cuda" or torch.version.cuda is None or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    return all(hasattr(operator, "dtype") for operator in (torch.ops.aten.bmm, torch.ops.aten.mm))
