"""Are real weight updates like Gaussian matrices? The premise of LoCA's theory (Section 2, Appendices A and B, Figures 1, 5).

For every matrix that two safetensors files share, the update trained - base is examined in three ways:

- its entries: the total variation to the normal distribution, the p-value of the test with a perturbed null (normality.py), and
  the p-value with a null of exactly normal entries;
- the eigenvalues of its correlation matrix against the Marchenko-Pastur law: the distance of the distribution functions, and
  the largest eigenvalue over the law's upper bound; also for Gaussian matrices of the same shape, and for the update with
  shuffled entries, which keeps their distribution and destroys their order;
- the consequence: the squared errors of a rank-r approximation and of the same budget of DCT coefficients, for the update and
  for its shuffled entries. For a Gaussian matrix, the DCT's error is smaller (Theorem 1).

It takes a minute on one core for the 72 matrices of a ViT-S.

    python examples/paper/update_statistics.py base.safetensors trained.safetensors --output updates
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import tyro
from numpy.typing import NDArray

from common import measure_parts, run, write_report
from loca_vision.checks import check_count, check_seed
from loca_vision.messages import aligned
from marchenko_pastur import bounds, cumulative, eigenvalues
from normality import check_epsilon, normal_statistics, null_statistics, p_value, statistic
from reconstruction import svd_and_dct_errors
from update_pictures import draw
from weight_updates import WeightUpdates

SCRIPT = "update_statistics.py"
LEVEL = 0.05
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Settings:
    """Compare weight updates between two files with Gaussian matrices: entries, eigenvalues, approximation errors."""

    base: tyro.conf.Positional[Path]
    """safetensors file of the weights before training."""
    trained: tyro.conf.Positional[Path]
    """safetensors file of the weights after training."""
    layers: tuple[str, ...] = ("*",)
    """Name patterns of the tensors to examine; matching any one is enough."""
    rank: int = 8
    """Rank r, which determines the budget of the approximations."""
    epsilon: float = 0.05
    """Total variation to the normal distribution that the test still accepts."""
    distributions: int = 100
    """Number of perturbed distributions for the test, with ten samples each."""
    gaussians: int = 100
    """Number of Gaussian matrices of each shape, for comparison."""
    seed: int = 0
    """Seed of the simulations."""
    output: Path = Path("update_statistics")
    """Folder for update_statistics.json and update_statistics.png."""

    def __post_init__(self) -> None:
        check_count("rank", self.rank)
        if not 0 < self.epsilon < 1:
            raise ValueError(f"epsilon={self.epsilon}: expected a number between 0 and 1")
        check_count("distributions", self.distributions)
        check_count("gaussians", self.gaussians)
        check_seed(self.seed)


def spectrum_statistics(matrix: Array) -> dict[str, float]:
    """Return the largest difference to the law's distribution function, and the largest eigenvalue over the law's bound."""
    values, aspect = eigenvalues(matrix)
    law, count = cumulative(values, aspect), len(values)
    distance = max(np.max(np.arange(1, count + 1) / count - law), np.max(law - np.arange(count) / count))
    return {"distance_to_law": float(distance), "largest_over_bound": float(values[-1] / bounds(aspect)[1])}


class Simulations:
    """The simulated references, computed once for each shape or number of entries."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.null = lru_cache(None)(self._null)
        self.exact = lru_cache(None)(self._exact)
        self.gaussian = lru_cache(None)(self._gaussian)

    def _null(self, count: int) -> Array:
        random = np.random.default_rng([self.settings.seed, 0, count])
        return null_statistics(count, self.settings.epsilon, self.settings.distributions, random)

    def _exact(self, count: int) -> Array:
        return normal_statistics(count, self.settings.gaussians, np.random.default_rng([self.settings.seed, 3, count]))

    def _gaussian(self, shape: tuple[int, int]) -> dict[str, float]:
        """Return the largest value of each statistic among the Gaussian matrices."""
        random = np.random.default_rng([self.settings.seed, 1, *shape])
        found = [spectrum_statistics(random.standard_normal(shape)) for _ in range(self.settings.gaussians)]
        return {name: max(one[name] for one in found) for name in found[0]}


def measure(update: Array, simulations: Simulations) -> dict[str, Any]:
    """Return all statistics of one update."""
    settings = simulations.settings
    scaled = (update - update.mean()) / update.std()
    observed = statistic(update)
    shuffled = np.random.default_rng([settings.seed, 2]).permutation(scaled.ravel()).reshape(update.shape)
    entries = {
        "deviation": float(update.std()),
        "excess_kurtosis": float(np.mean(scaled**4) - 3),
        "total_variation": observed,
        "p_value": p_value(observed, simulations.null(update.size)),
        "p_value_exact": p_value(observed, simulations.exact(update.size)),
    }
    return {
        "shape": list(update.shape),
        **_rounded(entries),
        "spectrum": _rounded(spectrum_statistics(update)),
        "spectrum_shuffled": _rounded(spectrum_statistics(shuffled)),
        "spectrum_gaussian_at_most": _rounded(simulations.gaussian(update.shape)),
        "errors": _errors(update, settings.rank),
        "errors_shuffled": _errors(shuffled, settings.rank),
    }


def _errors(matrix: Array, rank: int) -> dict[str, float]:
    (by_rank,), (by_dct,) = svd_and_dct_errors(matrix, [rank])
    return _rounded({"rank": by_rank, "dct": by_dct})


def _rounded(values: dict[str, float]) -> dict[str, float]:
    return {name: float(f"{value:.5g}") for name, value in values.items()}


def summary(parts: dict[str, dict[str, Any]], kinds: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Return, for each kind of matrix and for all, how many the tests accept, and medians."""
    groups = {kind: [parts[name] for name in parts if kinds[name] == kind] for kind in dict.fromkeys(kinds.values())}
    return {kind: _summary(own) for kind, own in (groups | {"all": list(parts.values())}).items()}


def _summary(own: list[dict[str, Any]]) -> dict[str, Any]:
    def law_holds(part: dict[str, Any], key: str) -> bool:
        return all(part[key][name] <= most for name, most in part["spectrum_gaussian_at_most"].items())

    return {
        "matrices": len(own),
        "normality_accepted": sum(part["p_value"] >= LEVEL for part in own),
        "exactly_normal_accepted": sum(part["p_value_exact"] >= LEVEL for part in own),
        "total_variation": median(part["total_variation"] for part in own),
        "law_accepted": sum(law_holds(part, "spectrum") for part in own),
        "law_accepted_shuffled": sum(law_holds(part, "spectrum_shuffled") for part in own),
        "largest_over_bound": median(part["spectrum"]["largest_over_bound"] for part in own),
        "dct_better": sum(part["errors"]["dct"] < part["errors"]["rank"] for part in own),
        "dct_better_shuffled": sum(part["errors_shuffled"]["dct"] < part["errors_shuffled"]["rank"] for part in own),
        **{
            f"{key}_{name}": mean(part[key][name] for part in own)
            for key in ("errors", "errors_shuffled")
            for name in ("rank", "dct")
        },
    }


def table(groups: dict[str, dict[str, Any]]) -> str:
    """Return a table of counts of matrices, medians of total variation and of the largest eigenvalue, and mean errors."""
    columns = {
        "matrices": "matrices",
        "normality_accepted": "normal",
        "exactly_normal_accepted": "exactly",
        "total_variation": "TV",
        "law_accepted": "MP law",
        "law_accepted_shuffled": "shuffled",
        "largest_over_bound": "largest / bound",
        "dct_better": "DCT better",
        "errors_rank": "error of rank r",
        "errors_dct": "of DCT",
        "errors_shuffled_rank": "shuffled: rank r",
        "errors_shuffled_dct": "DCT",
    }
    rows = [["", *columns.values()]]
    rows += [[kind, *(f"{own[name]:.3g}" for name in columns)] for kind, own in groups.items()]
    return aligned(rows, str.rjust)


def reproduce(settings: Settings) -> None:
    file = settings.output / "update_statistics.json"
    updates = WeightUpdates(settings.base, settings.trained, settings.layers)
    names = updates.changed()
    kinds = {name: updates.places[name].kind for name in names}
    smallest = min((updates.places[name].shape for name in names), key=math.prod)
    check_epsilon(settings.epsilon, math.prod(smallest))
    check_count("rank", settings.rank, 1, min(min(updates.places[name].shape) for name in names) // 2)
    simulations = Simulations(settings)
    measured = measure_parts(
        file, settings, names, lambda name: measure(updates.update(name), simulations), **updates.digests()
    )
    measured["summary"] = summary(measured["parts"], kinds)
    write_report(file, measured)
    draw(measured, kinds, updates, settings.output / "update_statistics.png")
    print(table(measured["summary"]))
    print(f"normal: p >= {LEVEL:g} with epsilon = {settings.epsilon:g}; MP law: no farther from it than {settings.gaussians}")
    print("Gaussian matrices of the shape; TV and largest / bound are medians, errors means over ||update||².")


def main(arguments: Sequence[str] | None = None) -> int:
    return run(SCRIPT, Settings, reproduce, arguments)


if __name__ == "__main__":
    sys.exit(main())
