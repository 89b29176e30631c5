"""Expected errors of Theorems 1 and 2 of LoCA (Section 3, Appendices G and H), as integrals over order statistics.

W in R^{K x K} has independent standard normal entries. All errors are shares of ||W||^2, whose expectation is K^2: direction
and norm of a Gaussian matrix are independent, so E ||W - W^||^2 = K^2 E (||W - W^||^2 / ||W||^2).

An orthonormal transform turns W into K^2 independent normal numbers. In units of K^2 / ||F||^2, a cell of the DFT's
non-redundant half has an exponential energy of mean 2 (real and imaginary part), and a single part or a DCT coefficient has a
chi-square energy with one degree of freedom. For an even K, four cells are real; here they count as two complex ones, which
changes shares by about 1e-5.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

from scipy.integrate import quad
from scipy.optimize import brentq
from scipy.stats import beta, norm

from marchenko_pastur import top_energy

RANDOM_CELLS, SVD, CELLS, PARTS, DCT = "F1: random DFT cells", "rank-r SVD", "F2: DFT cells", "F3: DFT parts", "DCT"
METHODS = (RANDOM_CELLS, SVD, CELLS, PARTS, DCT)  # from the largest error to the smallest, by Theorem 1


def budgets(shape: tuple[int, int], rank: int) -> tuple[int, int]:
    """Return the budgets that cost as many numbers as rank r: its two factors have r (p + q); an index counts as one number.

    Returns:
        The number of DFT cells, each a real part, an imaginary part and an index, and the number of single
        coefficients, each with an index. Both are rounded.
    """
    numbers = rank * sum(shape)
    return round(numbers / 3), round(numbers / 2)


def exponential_tail(share: float) -> float:
    """Return E[X; X > t] / E[X] for an exponential X, where P(X > t) = share."""
    return share * (1 - math.log(share)) if share else 0.0


def normal_tail(share: float) -> float:
    """Return E[Z^2; |Z| > t] for a standard normal Z, where P(|Z| > t) = share."""
    bound = norm.isf(share / 2)
    return float(2 * bound * norm.pdf(bound) + share) if 0 < share < 1 else share


def largest(tail: Callable[[float], float], count: int, among: int) -> float:
    """Return the expected share of energy in the `count` largest of `among` independent, identically distributed energies.

    Given the largest one left out, those above it are independent draws from the tail. P(X > the largest left out) has a
    Beta(count, among - count) distribution, so one integral replaces the sum over the order statistics (Eq. 28, Lemma 8).

    Args:
        tail: maps the share of draws above a threshold to their share of the energy.
    """
    if count in (0, among):
        return count / among
    below = beta(count, among - count)

    def integrand(share: float) -> float:
        return float(tail(share) * below.pdf(share))

    # E[sum of the largest] = among * integral of quantile(u) P(B > u) du = among * E[tail(B)]
    value, _ = quad(integrand, below.ppf(1e-13), below.isf(1e-13), epsabs=1e-11, limit=200)
    return float(value)


def expected_errors(size: int, rank: int) -> dict[str, float]:
    """Return each method's error over K^2; for the SVD, the limit of large K at the same rank / K (Marchenko-Pastur)."""
    cells, parts = budgets((size, size), rank)
    half, single = size * size // 2, largest(normal_tail, parts, size * size)
    real_cells = 2 - size % 2  # cells beyond K^2 / 2: four are their own mirror image for an even K, one for an odd K
    kept = (
        min(1.0, cells / (half + real_cells)),
        top_energy(rank / size),
        largest(exponential_tail, min(cells, half), half),
        single,
        single,
    )
    return {method: 1 - share for method, share in zip(METHODS, kept, strict=True)}


def limit_errors(share: float) -> dict[str, float]:
    """Return the same errors for large K at rank / K = share in (0, 3/4]; beyond that, all cells are kept."""
    cells, single = 4 * share / 3, normal_tail(share)
    kept = (cells, top_energy(share), exponential_tail(cells), single, single)
    return {method: 1 - part for method, part in zip(METHODS, kept, strict=True)}


def crossing(better: str, worse: str) -> float | None:
    """Return the rank / K below 3/4 above which `better` has the larger error in the limit of large K, or None."""

    def lead(share: float) -> float:
        errors = limit_errors(share)
        return errors[worse] - errors[better]

    shares = [i / 400 for i in range(1, 300)]
    for low, high in pairwise(shares):
        if lead(low) > 0 >= lead(high):
            return float(brentq(lead, low, high))
    return None
