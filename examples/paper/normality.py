"""Are the entries of a weight update normal, up to a total variation of epsilon? The test of LoCA's Section 2 and Appendix B.

The statistic is the total variation between the histogram of the entries and the normal distribution with their mean and
standard deviation. Under the null hypothesis, the true distribution is within epsilon of the normal one. The statistic is
simulated under it as in the appendix: as many normal samples as entries get small random perturbations; the distributions that
stay within epsilon are kept, ten samples are drawn from each, and the p-value is the share of their statistics that reach the
observed one.

Choices that the text leaves open: the histogram has 100 cells, equal from -5 to 5 standard deviations and open at both ends;
perturbations are uniform on [-a, a] standard deviations, with a itself uniform up to 1 for each distribution, so that the kept
ones range from the normal distribution to the border of the hypothesis.
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
    """Count the standardised values in each cell."""
    return np.bincount(np.searchsorted(EDGES, values.ravel()), minlength=CELLS)


def total_variation(found: NDArray[np.int64]) -> float:
    """Return the total variation, in [0, 1], between the histogram of these counts and the standard normal distribution."""
    return float(np.abs(found / found.sum() - NORMAL).sum() / 2)


def statistic(entries: Array) -> float:
    """Return the total variation between the entries and the normal distribution with their mean and standard deviation."""
    return total_variation(counts((entries - entries.mean()) / entries.std()))


def chance(count: int) -> float:
    """Return the total variation that `count` normal numbers have on average, because the sample is finite."""
    return float(np.sqrt(2 / math.pi * NORMAL * (1 - NORMAL) / count).sum() / 2)


def check_epsilon(epsilon: float, count: int) -> None:
    """Check that the test can work with this many entries.

    Raises:
        ValueError: epsilon is less than twice the total variation that this many normal numbers have by chance.
    """
    if epsilon < 2 * chance(count):
        raise ValueError(
            f"epsilon={epsilon}: {count} normal numbers already differ from their distribution by {chance(count):.3f} through "
            f"chance; choose at least {2 * chance(count):.3f}, or leave small matrices out with --layers"
        )


def null_statistics(count: int, epsilon: float, distributions: int, random: np.random.Generator) -> Array:
    """Simulate the statistic under the null hypothesis, (distributions * 10,), sorted, for matrices with `count` entries.

    It does not depend on mean and standard deviation, so one simulation serves all matrices of the same size.

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
    """Simulate the statistic of exactly normal entries, (samples,), from small to large."""
    return np.sort([statistic(random.standard_normal(count)) for _ in range(samples)])


def p_value(observed: float, null: Array) -> float:
    """Return the share of the sorted null statistics that are at least the observed one."""
    return float(1 - np.searchsorted(null, observed) / len(null))
