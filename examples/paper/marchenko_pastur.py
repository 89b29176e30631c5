"""The Marchenko-Pastur law: eigenvalues of the correlation matrix of a large random matrix (Appendix A of LoCA).

Let X (n, d) have independent entries of mean 0 and variance 1, with d <= n, and let d / n = aspect stay fixed as both grow.
Then the eigenvalues of X^T X / n fill [(1 - sqrt(aspect))^2, (1 + sqrt(aspect))^2] with the density below, whatever the
entries' distribution, as long as its fourth moment is finite.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy.integrate import cumulative_simpson
from scipy.optimize import brentq

Array = NDArray[np.float64]


def bounds(aspect: float) -> tuple[float, float]:
    """Return the smallest and the largest eigenvalue of the law, for an aspect in (0, 1].

    Raises:
        ValueError: the aspect is outside (0, 1].
    """
    if not 0 < aspect <= 1:
        raise ValueError(f"aspect={aspect}: columns by rows are in (0, 1]; transpose a wide matrix")
    return (1 - math.sqrt(aspect)) ** 2, (1 + math.sqrt(aspect)) ** 2


def density(values: Array, aspect: float) -> Array:
    """Return the density of eigenvalues, 0 outside the bounds."""
    low, high = bounds(aspect)
    inside = (values > low) & (values < high)
    safe = np.where(inside, values, 1.0)
    return np.where(inside, np.sqrt(np.clip((high - safe) * (safe - low), 0, None)) / (2 * math.pi * aspect * safe), 0.0)


def cumulative(values: Array, aspect: float) -> Array:
    """Return the share of eigenvalues up to each value."""
    low, high = bounds(aspect)
    # The substitution value = 1 + aspect - 2 sqrt(aspect) cos(angle) smooths the square roots at the edges.
    angles = np.linspace(0, math.pi, 4001)[1:]  # without angle 0, where the integrand is 0 / 0 at aspect 1
    eigenvalues = 1 + aspect - 2 * math.sqrt(aspect) * np.cos(angles)
    shares = cumulative_simpson(2 / math.pi * np.sin(angles) ** 2 / eigenvalues, x=angles, initial=0)
    shares += 1 - shares[-1]  # the share below the first angle
    return np.asarray(np.interp(np.clip(values, low, high), eigenvalues, shares, left=0.0))


def top_energy(share: float) -> float:
    """Return the share of a square matrix's squared Frobenius norm that lies in its largest singular values.

    The singular values over sqrt(K) have the density sqrt(4 - x^2) / pi on [0, 2] (the law at aspect 1). With x = 2 cos(angle),
    both integrals are elementary.

    Args:
        share: the share of the singular values to count, r / K in [0, 1].
    """

    def excess(angle: float) -> float:
        return 2 / math.pi * (angle - math.sin(angle) * math.cos(angle)) - share

    angle = brentq(excess, 0.0, math.pi / 2) if 0 < share < 1 else share * math.pi / 2
    return float(2 / math.pi * (angle - math.sin(4 * angle) / 4))


def eigenvalues(matrix: Array) -> tuple[Array, float]:
    """Return the eigenvalues of the correlation matrix, from small to large, and the aspect of a (p, q) matrix with p q > 1.

    All entries are centred and scaled together, as suits independent entries of one distribution.
    """
    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
    scaled = (tall - tall.mean()) / tall.std()
    return np.linalg.eigvalsh(scaled.T @ scaled / len(scaled)), tall.shape[1] / tall.shape[0]


def outside_share(matrix: Array) -> float:
    """Return the share of the eigenvalues' sum outside the law's bounds (one reading of the test statistic in Eq. 35)."""
    values, aspect = eigenvalues(matrix)
    low, high = bounds(aspect)
    return float(values[(values < low) | (values > high)].sum() / values.sum())
