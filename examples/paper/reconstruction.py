"""Best approximations of a given matrix at equal budgets: by rank, DFT cells, DFT parts, DCT coefficients (LoCA, Section 3)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.fft import dctn, fft2

from expected_errors import METHODS, budgets

Array = NDArray[np.float64]


def fourier_energies(matrix: Array) -> tuple[Array, Array]:
    """Return energies of the DFT's non-redundant half: of its cells, and of its p q single real and imaginary parts.

    A cell and its mirror image are conjugates and count together, with twice the energy of one. Cells that are their own mirror
    image are real. Both arrays sum to ||matrix||^2.
    """
    rows, cols = matrix.shape
    spectrum = fft2(matrix, norm="ortho")
    places = np.arange(rows * cols).reshape(rows, cols)
    mirrored = places[-np.arange(rows) % rows][:, -np.arange(cols) % cols]
    pairs, singles = spectrum[places < mirrored], spectrum[places == mirrored].real
    cells = np.concatenate([2 * np.abs(pairs) ** 2, singles**2])
    parts = np.concatenate([2 * pairs.real**2, 2 * pairs.imag**2, singles**2])
    return cells, parts


def left_over(energies: Array, counts: Sequence[int]) -> list[float]:
    """Return the share of energy lost if the first `count` are kept, for each count; counts beyond the last lose nothing."""
    kept = np.concatenate([[0.0], np.cumsum(energies)])
    return [float(1 - kept[min(count, len(energies))] / kept[-1]) for count in counts]


def descending(energies: Array) -> Array:
    return np.asarray(np.sort(energies, axis=None)[::-1])


def svd_and_dct_errors(matrix: Array, ranks: Sequence[int]) -> tuple[list[float], list[float]]:
    """Return squared errors over ||matrix||^2 of each rank's best approximation, and of DCT coefficients at equal budgets."""
    parts = [budgets(matrix.shape, rank)[1] for rank in ranks]
    by_rank = left_over(np.asarray(np.linalg.svd(matrix, compute_uv=False), np.float64) ** 2, ranks)
    return by_rank, left_over(descending(dctn(matrix, norm="ortho") ** 2), parts)


def errors(matrix: Array, ranks: Sequence[int], random: np.random.Generator) -> dict[str, list[float]]:
    """Return squared errors over ||matrix||^2 of all five methods for each rank; `random` chooses the cells of F1."""
    cells, parts = fourier_energies(matrix)
    cell_counts, part_counts = zip(*(budgets(matrix.shape, rank) for rank in ranks), strict=True)
    by_rank, by_dct = svd_and_dct_errors(matrix, ranks)
    found = (
        left_over(random.permutation(cells), cell_counts),
        by_rank,
        left_over(descending(cells), cell_counts),
        left_over(descending(parts), part_counts),
        by_dct,
    )
    return dict(zip(METHODS, found, strict=True))
