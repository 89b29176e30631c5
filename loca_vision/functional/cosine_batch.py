"""Sums of cosines of one shape, built together and differentiated together by a few large products.

A single sum takes about twenty small operations, and an accelerator spends more time launching each than executing it.
Of two forms, the one with fewer multiplications is used: products over the components, or over the frequencies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from loca_vision.functional import batch_by_components, batch_by_frequencies
from loca_vision.functional.batch_tables import BatchCells
from loca_vision.functional.cosine_atoms import AtomSettings
from loca_vision.functional.split_products import is_preferred
from loca_vision.functional.transforms import ordinary_tensors


@dataclass(frozen=True)
class CosineBatch:
    """N sums of cosines of one shape (p, q), with M components in total.

    Attributes:
        coefficients: (M,) float32 or float64, one sum after the other.
        layout: the cells of the components.
        scale: alpha, the same for all sums.
        difference: how the slope along an axis is estimated, as in `AtomSettings`.
        split: whether float32 products are sums of products of bfloat16 parts.
    """

    coefficients: Tensor
    layout: BatchCells
    scale: float
    difference: str
    split: bool = False

    def matrices(self) -> Tensor:
        """Return the sums, (N, p, q)."""
        values = self.coefficients if self.scale == 1 else self.coefficients * self.scale
        made: Tensor = self._form.matrices(values, self.layout, self.split)
        return made

    def gradients(self, grads: Sequence[Tensor], learned: bool, moving: bool) -> tuple[Tensor | None, Tensor | None]:
        """Return the gradients of coefficients (M,) and locations (M, 2).

        Args:
            grads: the gradients of the N matrices, (p, q) each, in any floating-point dtype.
            learned, moving: whether the gradients of coefficients and of locations are wanted; None is returned otherwise.
        """
        form, like = self._form, self.coefficients
        z, *slopes = form.rows(grads, self.layout, self.difference if moving else None, like, self.split)
        coefficients = (z if self.scale == 1 else z * self.scale) if learned else None
        if not moving:
            return coefficients, None
        return coefficients, torch.stack(slopes, 1) * _lengths(self.layout.shape, self.scale, like) * like[:, None]

    def part(self, members: Sequence[int]) -> CosineBatch:
        """Return the batch of some of the sums."""
        layout = self.layout
        cells, coefficients = torch.split(layout.cells, layout.counts), torch.split(self.coefficients, layout.counts)
        chosen = BatchCells(torch.cat([cells[i] for i in members]), [layout.counts[i] for i in members], layout.shape)
        return replace(self, coefficients=torch.cat([coefficients[i] for i in members]), layout=chosen)

    @property
    def _form(self) -> Any:
        """The cheaper of the two forms.

        On an H200, 36 matrices of 1280 x 1280 with 1000 components take 2.5 ms forward and backward by components and 3.9 ms by
        frequencies; 30 matrices of 640 x 640 with as many components take 1.0 and 0.8 ms.
        """
        counts = set(self.layout.counts)
        few = len(counts) == 1 and 2 * max(counts) < sum(self.layout.shape)
        return batch_by_components if few else batch_by_frequencies


def batch_of(coefficients: Tensor, layout: BatchCells, settings: AtomSettings, dtype: torch.dtype) -> CosineBatch:
    """Return the batch of sums with coefficients (M,) at the cells of the layout, for activations of this dtype."""
    split = coefficients.dtype == torch.float32 and is_preferred(coefficients.device, dtype)
    return CosineBatch(coefficients, layout, settings.scale, settings.difference, split)


def _lengths(shape: tuple[int, int], scale: float, like: Tensor) -> Tensor:
    """Return (2,), the number of cells from 0 to 1 along each axis, times the scale."""
    return _lengths_on(shape, scale, like.device, like.dtype)


@lru_cache(maxsize=64)
def _lengths_on(shape: tuple[int, int], scale: float, device: torch.device, dtype: torch.dtype) -> Tensor:
    with ordinary_tensors():
        return torch.tensor([scale * (size - 1) for size in shape], dtype=dtype, device="cpu").to(device)
