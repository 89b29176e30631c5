"""How much correlation makes a low-rank update the better one? The critical correlation of LoCA (Appendix P, Figure 15).

A rank-r approximation of a K x K matrix W is compared with the same budget of DCT coefficients (K r of them, each with an
index) as entries become correlated. There are two models of correlation, since the paper's own has no critical point:

- uniform: vec(W) ~ N(0, (1 - rho) I + rho 11^T), Eqs. 33 and 34 as they stand: W = sqrt(1 - rho) Z + sqrt(rho) g 11^T with
  one normal number g. The spike 11^T has rank one, but it is also the first DCT atom: both methods capture it immediately.
- random: W = sqrt(1 - rho) Z + sqrt(rho) u v^T, u and v normal vectors of norm sqrt(K). The spike has rank one and is spread
  over the whole DCT spectrum.

The critical rho is the smallest one at which the rank-r error is smaller on average, found by simulation and by integrals for
large K. The test of Eq. 35 shows whether that much correlation is visible in the eigenvalues: it compares the share of their
sum that lies outside the Marchenko-Pastur bounds with its 95 % quantile for independent entries. Half a minute on one core.

    python examples/paper/critical_correlation.py --output critical
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.stats import norm

from common import measure_parts, plain, run, write_report
from loca_vision.checks import check_count, check_seed, check_share
from loca_vision.messages import aligned
from loca_vision.recipes.reports.plots import save
from marchenko_pastur import outside_share, top_energy
from reconstruction import svd_and_dct_errors

SCRIPT = "critical_correlation.py"
MODELS = ("uniform", "random")
COLOURS = {"uniform": "#8c8c8c", "random": "#0b6e99"}
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Settings:
    """Find the correlation from which rank r loses less than DCT coefficients at equal budgets, for two correlation models."""

    size: int = 300
    """Size K: rows and columns of the matrices."""
    ranks: tuple[int, ...] = (8, 16, 24, 32)
    """Ranks r."""
    rho_step: float = 0.02
    """Step between the correlations, from 0 to below 1."""
    trials: int = 10
    """Number of matrices of each model; all correlations use the same ones."""
    null_trials: int = 200
    """Number of matrices with independent entries for the quantile of the test."""
    seed: int = 0
    """Seed of the matrices."""
    output: Path = Path("critical_correlation")
    """Folder for critical_correlation.json and critical_correlation.png."""

    def __post_init__(self) -> None:
        check_count("size", self.size, 12)
        for rank in self.ranks:
            check_count("ranks", rank, 1, self.size // 3)
        check_share("rho_step", self.rho_step)
        if not 0.001 <= self.rho_step <= 0.5:
            raise ValueError(f"rho_step={self.rho_step}: expected a number from 0.001 to 0.5")
        check_count("trials", self.trials, 2)
        check_count("null_trials", self.null_trials, 20)
        check_seed(self.seed)

    @property
    def correlations(self) -> list[float]:
        return [round(i * self.rho_step, 6) for i in range(math.ceil(1 / self.rho_step - 1e-9))]


def spike(model: str, size: int, random: np.random.Generator) -> Array:
    """Return the matrix (K, K) added to independent entries, with rank one and mean square 1 (in expectation for `uniform`)."""
    if model == "uniform":
        return np.full((size, size), random.standard_normal())
    u, v = (vector * math.sqrt(size) / np.linalg.norm(vector) for vector in random.standard_normal((2, size)))
    return np.asarray(np.outer(u, v))


def measure(part: str, settings: Settings) -> dict[str, Any]:
    """Run one trial of a model.

    Returns:
        Errors over ||W||^2 by rank and by DCT, (rho, ranks) each, and the test statistic at each rho. For the part
        "independent", the test statistics under the null hypothesis.
    """
    if part == "independent":
        return {"outside": null_statistics(settings)}
    model, trial = part.split()
    random = np.random.default_rng([settings.seed, MODELS.index(model), int(trial)])
    noise = random.standard_normal((settings.size, settings.size))
    added = spike(model, settings.size, random)
    by_rank, by_dct, outside = [], [], []
    for rho in settings.correlations:
        matrix = math.sqrt(1 - rho) * noise + math.sqrt(rho) * added
        low_rank, cosines = svd_and_dct_errors(matrix, settings.ranks)
        by_rank.append(low_rank)
        by_dct.append(cosines)
        outside.append(outside_share(matrix))
    found: dict[str, list[Any]] = {"rank": by_rank, "dct": by_dct, "outside": outside}
    return {name: np.round(values, 6).tolist() for name, values in found.items()}


def null_statistics(settings: Settings) -> list[float]:
    random = np.random.default_rng([settings.seed, len(MODELS)])
    matrices = (random.standard_normal((settings.size, settings.size)) for _ in range(settings.null_trials))
    return [round(outside_share(matrix), 6) for matrix in matrices]


def critical(correlations: Sequence[float], leads: Array) -> float | None:
    """Return the smallest rho at which the DCT's lead, error by rank minus error by DCT, falls to 0, or None if it never does.

    The lead is interpolated linearly between neighbouring correlations.
    """
    for place in range(1, len(leads)):
        before, after = leads[place - 1], leads[place]
        if before > 0 >= after:
            low, high = correlations[place - 1], correlations[place]
            return float(low + (high - low) * before / (before - after))
    return None


def random_spike_errors(rho: float, size: int, rank: int) -> tuple[float, float]:
    """Return errors over K^2 by rank and by DCT in the limit of large K, for the model `random`.

    One rank captures the spike and, by the first-order theory of spiked matrices, 2 (1 - rho) / K of the noise; the other ranks
    capture the largest singular values of the noise. A DCT coefficient of the spike is a product of two normal numbers; given
    one of them, a, the coefficient of W is normal with variance 1 - rho + rho a^2.
    """
    noise = 1 - rho
    by_rank = noise * (1 - top_energy((rank - 1) / size) - 2 / size)
    factors, weights = np.polynomial.hermite_e.hermegauss(80)
    weights = weights / weights.sum()
    deviations = np.sqrt(noise + rho * factors**2)

    def excess(bound: float) -> float:
        return float(weights @ (2 * norm.sf(bound / deviations))) - rank / size

    bounds = brentq(excess, 0, 40) / deviations
    by_dct = 1 - float(weights @ (deviations**2 * 2 * (bounds * norm.pdf(bounds) + norm.sf(bounds))))
    return by_rank, by_dct


def by_integrals(size: int, rank: int) -> float:
    """Return the critical rho of the model `random` for large K."""

    def lead(rho: float) -> float:
        by_rank, by_dct = random_spike_errors(rho, size, rank)
        return by_rank - by_dct

    return float(brentq(lead, 0.01, 0.95))


def summary(report: dict[str, Any], settings: Settings) -> dict[str, Any]:
    """Return, for each model, the critical rho of each rank, the DCT's relative error by rho, and where the test detects it."""
    correlations, parts = settings.correlations, report["parts"]
    limit = float(np.quantile(parts["independent"]["outside"], 0.95))
    found: dict[str, Any] = {"test_critical_value": limit}
    for model in MODELS:
        own = [parts[f"{model} {trial}"] for trial in range(settings.trials)]
        by_rank, by_dct = (np.array([one[name] for one in own]) for name in ("rank", "dct"))
        outside = np.mean([one["outside"] for one in own], axis=0)
        each = enumerate(settings.ranks)
        rows = [_row(rank, by_rank[:, :, place], by_dct[:, :, place], outside, settings) for place, rank in each]
        detected = next((rho for rho, value in zip(correlations, outside, strict=True) if value > limit), None)
        found[model] = {"ranks": rows, "detected_from_rho": detected}
    return found


def _row(rank: int, by_rank: Array, by_dct: Array, outside: Array, settings: Settings) -> dict[str, Any]:
    """Return the results of one rank from errors (trials, rho)."""
    correlations, leads = settings.correlations, by_rank - by_dct
    value = critical(correlations, leads.mean(axis=0))
    ratio = by_dct.mean(axis=0) / by_rank.mean(axis=0)
    row: dict[str, Any] = {"rank": rank, "critical_rho": value, "ratio": ratio.round(5).tolist()}
    if value is not None:
        each = [one for lead in leads if (one := critical(correlations, lead)) is not None]
        row["standard_error"] = float(np.std(each, ddof=1) / math.sqrt(len(each))) if len(each) > 1 else None
        row["integral"] = by_integrals(settings.size, rank)
        row["test_statistic"] = float(np.interp(value, correlations, outside))
    return row


def draw(found: dict[str, Any], settings: Settings, path: Path) -> None:
    """Plot the DCT's error over that of rank r by rho for each model, and the critical rho by rank."""
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    panels = figure.subplots(1, 3)
    for axes, model in zip(panels, MODELS, strict=False):
        for row in found[model]["ranks"]:
            strength = 0.3 + 0.7 * row["rank"] / max(settings.ranks)
            axes.plot(settings.correlations, row["ratio"], color=COLOURS[model], alpha=strength, label=f"r = {row['rank']}")
        axes.axhline(1, color="black", linewidth=0.8, linestyle=":")
        axes.legend(frameon=False)
        plain(axes).set(xlabel="rho", ylabel="error of the DCT / error of rank r", title=f"{model} correlation")
    panels[0].set_ylim(None, 1.02)
    panels[1].set_yscale("log")
    _draw_critical(panels[2], found["random"]["ranks"])
    save(figure, path)


def _draw_critical(axes: Axes, rows: list[dict[str, Any]]) -> None:
    known = [row for row in rows if row["critical_rho"] is not None]
    ranks = [row["rank"] for row in known]
    spreads = [2 * (row["standard_error"] or 0) for row in known]
    axes.errorbar(ranks, [row["critical_rho"] for row in known], spreads, fmt="o", color=COLOURS["random"], label="simulation")
    axes.plot(ranks, [row["integral"] for row in known], color=COLOURS["random"], linewidth=1, label="integrals, large K")
    axes.legend(frameon=False)
    plain(axes).set(xlabel="r", ylabel="critical rho", title="random: rank r is better above", ylim=(0, None))


def table(found: dict[str, Any]) -> str:
    rows = [["model", "r", "critical rho", "standard error", "integral", "statistic there"]]
    names = ("critical_rho", "standard_error", "integral", "test_statistic")
    for model in MODELS:
        for row in found[model]["ranks"]:
            told = [f"{row[name]:.4f}" if row.get(name) is not None else "-" for name in names]
            rows.append([model, str(row["rank"]), *told])
    return aligned(rows, str.rjust)


def reproduce(settings: Settings) -> None:
    file = settings.output / "critical_correlation.json"
    names = [f"{model} {trial}" for model in MODELS for trial in range(settings.trials)] + ["independent"]
    report = measure_parts(file, settings, names, lambda part: measure(part, settings))
    report["summary"] = found = summary(report, settings)
    write_report(file, report)
    draw(found, settings, settings.output / "critical_correlation.png")
    print(table(found))
    print(f"Test: independent entries stay below {found['test_critical_value']:.4f} in 95 of 100 matrices.")
    for model in MODELS:
        if all(row["critical_rho"] is None for row in found[model]["ranks"]):
            most = max(max(row["ratio"]) for row in found[model]["ranks"])
            print(f"{model}: the DCT loses less at every rho, at most {most:.3f} of what rank r loses.")


def main(arguments: Sequence[str] | None = None) -> int:
    return run(SCRIPT, Settings, reproduce, arguments)


if __name__ == "__main__":
    sys.exit(main())
