"""How near a result has to come to its oracle, on any device: the only place that says so.

Numbers are relative to the largest one of the oracle. A device sums in another order than the CPU, but as exactly: float64 to
nine digits and float32 to five, with products in full float32 (`tests/conftest.py` turns TF32 off, which keeps three). Under
autocast activations are bfloat16, of three digits, and errors of a few layers add up.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

RELATIVE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 3e-2}
GRADIENTS = 10.0  # how much further gradients of whole models may be off than their outputs, through the layers there and back
STEPS = 50.0  # and what follows from them after a few steps of an optimiser, which divides by their size


def assert_near(found: Tensor, wanted: Tensor, factor: float = 1.0, dtype: torch.dtype | None = None) -> None:
    """`found`, on whichever device, is `wanted` up to rounding in `dtype`, by default its own."""
    assert found.shape == wanted.shape and bool(found.isfinite().all())
    largest = float(wanted.detach().abs().max()) if wanted.numel() else 0.0
    error = float((found.detach().cpu().double() - wanted.detach().cpu().double()).abs().max()) if wanted.numel() else 0.0
    assert error <= factor * RELATIVE[dtype or found.dtype] * largest, f"off by {error:.2e} of {largest:.2e}"


def assert_all_near(found: Iterable[Tensor], wanted: Iterable[Tensor], factor: float = 1.0, dtype: torch.dtype | None = None):
    """Tensors that belong together: relative to the largest number of all."""
    for one, other in zip(pair := [*found], wanted := [*wanted], strict=True):
        assert one.shape == other.shape
    flat = [torch.cat([value.detach().flatten().cpu().double() for value in values]) for values in (pair, wanted)]
    assert_near(*flat, factor, dtype or pair[0].dtype)
