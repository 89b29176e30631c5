"""Are the entries of a weight update normal, up to a total variation of epsilon? The test of LoCA's Section 2 and Appendix B.

The statistic is the total variation between the histogram of the entries and the normal distribution of their mean and
deviation. Under the null hypothesis the true distribution is within epsilon of the normal one. There the statistic is simulated
as in the appendix: as many normal samples as entries get small random perturbations; those distributions that stay within
epsilon are kept, ten samples are drawn from each, and the p-value is the share of their statistics that reach the observed one.

Choices where the text has none: 100 cells of the histogram, equal from -5 to 5 deviations and open at both ends; perturbations
uniform on [-a, a] deviations, with a itself uniform up to 1 for each distribution, so that those kept reach from the normal
distribution to the border of the hypothesis.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm

Array = NDArray[np.float64]
CELLS, WIDEST = 100, 5.0
EDGES = np.linspace(-WIDEST, WIDEST, CELLS - 1)
NORMAL = np.diff(norm.cdf(EDGES), prepend=0, append=1)
NORMAL = NORMAL / NORMAL.sum()
SETS, LARGEST_PERTURBATION = 10, 1.0


def counts(values: Array) -> NDArray[np.int64]:
    """How many of the standardised values lie in each cell."""
    return np.bincount(np.searchsorted(EDGES, values.ravel()), minlength=CELLS)


def total_variation(found: NDArray[np.int64]) -> float:
    """Between the histogram of these counts and the standard normal distribution, in [0, 1]."""
    return float(np.abs(found / found.sum() - NORMAL).sum() / 2)


def statistic(entries: Array) -> float:
    """The total variation between the entries and the normal distribution of their mean and deviation."""
    return total_variation(counts((entries - entries.mean()) / entries.std()))


def chance(count: int) -> float:
    """The total variation that `count` normal numbers have on average, because they are no more than that."""
    return float(np.sqrt(2 / math.pi * NORMAL * (1 - NORMAL) / count).sum() / 2)


def check_epsilon(epsilon: float, count: int) -> None:
    """
    Raises:
        ValueError: so few entries differ from their distribution by as much as epsilon through chance alone.
    """
    if epsilon < 2 * chance(count):
        raise ValueError(
            f"epsilon={epsilon}: {count} normal numbers already differ from their distribution by {chance(count):.3f} through "
            f"chance; choose at least {2 * chance(count):.3f}, or leave small matrices out with --layers"
        )


def null_statistics(count: int, epsilon: float, distributions: int, random: np.random.Generator) -> Array:
    """The statistic under the null hypothesis, (distributions * 10,), from small to large, for matrices of `count` entries.

    It does not depend on mean and deviation, so that one simulation serves all matrices of a size.

    Raises:
        ValueError: see `check_epsilon`.
    """
    check_epsilon(epsilon, count)
    found: list[float] = []
    while len(found) < distributions * SETS:
        samples = random.standard_normal(count)
        samples += random.uniform(-1, 1, count) * random.uniform(0, LARGEST_PERTURBATION)
        perturbed = counts(samples)
        if total_variation(perturbed) < epsilon:
            # Drawing points from an empirical distribution and counting them is a multinomial draw.
            found += [total_variation(drawn) for drawn in random.multinomial(count, perturbed / count, SETS)]
    return np.sort(found)


def normal_statistics(count: int, samples: int, random: np.random.Generator) -> Array:
    """The statistic of exactly normal entries, (samples,), from small to large."""
    return np.sort([statistic(random.standard_normal(count)) for _ in range(samples)])


def p_value(observed: float, null: Array) -> float:
    """The share of the sorted null statistics that are at least the observed one."""
    return float(1 - np.searchsorted(null, observed) / len(null))
