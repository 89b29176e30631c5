"""A spectrum of cosines that is held to be applied, and takes 8 bytes a component."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from loca_vision.functional.cosine_atoms import Cells
from loca_vision.functional.cosine_sum import cosine_matrix
from loca_vision.functional.sample_spectra import PackedSpectrum
from loca_vision.functional.token_bases import COSINES, TokenBasis
from loca_vision.methods.update import Operation


class PackedUpdate:
    """What calls that mix adapters ask of an `Update`, in a fraction of a module's memory. It does not learn."""

    __slots__ = ("spectrum",)
    needs_weight = False
    inactive = False

    def __init__(self, spectrum: PackedSpectrum) -> None:
        self.spectrum = spectrum

    def tensors(self) -> tuple[Tensor, ...]:
        return self.spectrum.coefficients, self.spectrum.index

    def learns(self) -> bool:
        return False

    def token_spectrum(self) -> tuple[TokenBasis, PackedSpectrum]:
        return COSINES, self.spectrum

    def factors(self, strength: float = 1.0) -> None:
        """None: it is of no low rank."""

    def __call__(self, operation: Operation = "delta", *inputs: Any) -> Tensor:
        """Its `delta`, or what it makes of activations, by building the matrix."""
        x, strength = inputs[:2] if operation == "apply_to" else (None, *inputs[:1])
        settings = self.spectrum.settings
        delta = cosine_matrix(*self._unpacked(), settings.scale * strength)
        return delta if x is None else F.linear(x, delta.to(x))

    def _unpacked(self) -> tuple[Tensor, Cells]:
        shape, index = self.spectrum.settings.shape, self.spectrum.index.long()
        width = COSINES.width(shape[1])
        (rows, row_signs), (cols, col_signs) = _frequency(index // width, shape[0]), _frequency(index % width, shape[1])
        return self.spectrum.coefficients * row_signs * col_signs, Cells(torch.stack([rows, cols], 1), shape)


def _frequency(row: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The frequency that a packed row of vectors of length n holds, and its sign."""
    lower = row % 2 == 0
    return torch.where(lower, row // 2, n - row // 2), torch.where(lower, 1.0, -1.0)
