"""A spectrum of cosines that is held to be applied, and takes 8 bytes a component."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from threading import Lock
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from loca_vision.functional.cosine_atoms import Cells
from loca_vision.functional.cosine_sum import cosine_matrix
from loca_vision.functional.sample_spectra import PackedSpectrum, check_packs, packed_cosines
from loca_vision.functional.token_bases import COSINES, TokenBasis
from loca_vision.functional.transforms import ordinary_tensors
from loca_vision.methods.update import Operation


class Packing:
    """Spectra of matrices of one shape (p, q), which are packed together when the first of them is used.

    Args:
        coefficients: (B,) of each spectrum.
        flat: (B,) of each, cells row * q + column.
        scale: alpha.
        device: where they are to be.

    Raises:
        ValueError: the matrix has more frequencies than int32 can number.
    """

    def __init__(
        self,
        coefficients: Sequence[Tensor],
        flat: Sequence[Tensor],
        shape: tuple[int, int],
        scale: float,
        device: torch.device,
    ) -> None:
        check_packs(shape)
        self.counts = [len(one) for one in coefficients]
        self._work: Callable[[], list[PackedSpectrum]] | None = partial(
            packed_cosines, coefficients, flat, shape, scale, device
        )
        self._made: list[PackedSpectrum] = []
        self._lock = Lock()

    def spectrum(self, number: int) -> PackedSpectrum:
        """One of them."""
        if self._work is not None:
            with self._lock:
                if self._work is not None:
                    with ordinary_tensors():  # whatever mode the call is in that is the first
                        self._made = self._work()
                    self._work = None  # and what they were made from is free
        return self._made[number]


class PackedUpdate:
    """What calls that mix adapters ask of an `Update`, in a fraction of a module's memory. It does not learn.

    Args:
        packing: of this spectrum and others.
        number: which of them it is.
    """

    __slots__ = ("number", "packing")
    needs_weight = False
    inactive = False

    def __init__(self, packing: Packing, number: int) -> None:
        self.packing, self.number = packing, number

    @property
    def spectrum(self) -> PackedSpectrum:
        return self.packing.spectrum(self.number)

    @property
    def nbytes(self) -> int:
        """What it takes: a float32 and an int32 for each component."""
        return 8 * self.packing.counts[self.number]

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
