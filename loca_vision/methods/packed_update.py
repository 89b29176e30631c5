"""A spectrum of cosines that can be applied but not trained, stored in 8 bytes per component."""

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
    """Spectra of matrices of one shape (p, q), packed together when the first of them is used.

    Args:
        coefficients: the coefficients (B,) of each spectrum.
        flat: the cells (B,) of each spectrum, as row * q + column.
        scale: alpha.
        device: the device to put the packed spectra on.

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
        """Return the packed spectrum with this number; the first call packs all of them."""
        if self._work is not None:
            with self._lock:
                if self._work is not None:
                    with ordinary_tensors():  # whatever mode the first call is in
                        self._made = self._work()
                    self._work = None  # frees the tensors that the packed spectra were made from
        return self._made[number]


class PackedUpdate:
    """The part of the `Update` interface that calls mixing adapters use, in a fraction of a module's memory.

    It cannot be trained.

    Args:
        packing: the packing that holds this spectrum and others.
        number: the index of this spectrum in the packing.
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
        """The memory it takes: a float32 and an int32 for each component."""
        return 8 * self.packing.counts[self.number]

    def tensors(self) -> tuple[Tensor, ...]:
        return self.spectrum.coefficients, self.spectrum.index

    def learns(self) -> bool:
        return False

    def token_spectrum(self) -> tuple[TokenBasis, PackedSpectrum]:
        return COSINES, self.spectrum

    def factors(self, strength: float = 1.0) -> None:
        """Return None: the update is not of low rank."""

    def __call__(self, operation: Operation = "delta", *inputs: Any) -> Tensor:
        """Return its `delta`, or the result of applying it to activations; both build the matrix."""
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
    """Return the frequency that a packed row holds, for vectors of length n, and its sign."""
    lower = row % 2 == 0
    return torch.where(lower, row // 2, n - row // 2), torch.where(lower, 1.0, -1.0)
