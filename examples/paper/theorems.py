"""Theorems 1 and 2 of LoCA: which approximation of a Gaussian matrix loses least at equal budgets? (Section 3, Figures 6 and 7)

W in R^{K x K} has independent N(0, 1) entries. Five approximations cost 2 K r numbers, like rank r, where an index counts as
one number: the rank-r SVD, 2 K r / 3 random cells of the DFT's non-redundant half (F1), its 2 K r / 3 largest cells (F2), its
K r largest single real or imaginary parts (F3), and the K r largest DCT coefficients. Theorem 1 says that the errors satisfy
F3 < F2 < SVD < F1 for r <= K / 3; Theorem 2 says DCT = F3. Both are checked by simulation and by integrals
(expected_errors.py). It takes half a minute on one core.

    python examples/paper/theorems.py --output theorems
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
from tqdm import tqdm

from common import measure_parts, plain, run, write_report
from expected_errors import CELLS, DCT, METHODS, PARTS, RANDOM_CELLS, SVD, crossing, expected_errors, limit_errors
from loca_vision.checks import check_count, check_seed
from loca_vision.messages import aligned
from loca_vision.recipes.reports.plots import save
from reconstruction import errors

SCRIPT = "theorems.py"
COLOURS = dict(zip(METHODS, ("#d1603d", "#8c8c8c", "#d9a420", "#7b3294", "#0b6e99"), strict=True))
CLAIMS = ((SVD, RANDOM_CELLS), (CELLS, SVD), (PARTS, CELLS))  # Theorem 1: the first of each pair has the smaller error


@dataclass(frozen=True)
class Settings:
    """Compute errors of five approximations of Gaussian matrices at equal budgets, by simulation and by integrals."""

    sizes: tuple[int, ...] = (100, 150, 200, 250, 300, 768)
    """Sizes K: rows and columns of the matrices."""
    ranks: tuple[int, ...] = (8, 16, 24, 32)
    """Ranks r, which determine the budgets; 1/12, 1/6, 1/3, 1/2 and 2/3 of each K are added."""
    trials: int = 20
    """Number of matrices of each size."""
    seed: int = 0
    """Seed of the matrices and the random cells."""
    output: Path = Path("theorems")
    """Folder for theorems.json and theorems.png."""

    def __post_init__(self) -> None:
        for size in self.sizes:
            check_count("sizes", size, 12)
        for rank in self.ranks:
            check_count("ranks", rank, 1, 3 * min(self.sizes) // 4)
        check_count("trials", self.trials, 2)
        check_seed(self.seed)


def ranks_of(size: int, settings: Settings) -> list[int]:
    return sorted({*settings.ranks, *(round(size * share) for share in (1 / 12, 1 / 6, 1 / 3, 1 / 2, 2 / 3))})


def measure(size: int, settings: Settings) -> dict[str, Any]:
    """Return mean errors over ||W||^2 with standard errors, and the integrals, for each rank.

    `differences` has the mean of the larger error minus the smaller one for each claim, with its standard error: the
    differences are paired, since the methods see the same matrices.
    """
    random = np.random.default_rng([settings.seed, size])
    ranks = ranks_of(size, settings)
    trials = tqdm(range(settings.trials), desc=f"{size} x {size}", leave=False, disable=None)
    runs = [errors(random.standard_normal((size, size)), ranks, random) for _ in trials]
    values = {method: np.array([one[method] for one in runs]) for method in METHODS}
    integrals = [expected_errors(size, rank) for rank in ranks]
    found: dict[str, Any] = {"ranks": ranks, "errors": {}, "differences": {}}
    for method in METHODS:
        found["errors"][method] = _mean(values[method]) | {"integral": [round(one[method], 6) for one in integrals]}
    for smaller, larger in (*CLAIMS, (DCT, PARTS)):
        found["differences"][f"{larger} - {smaller}"] = _mean(values[larger] - values[smaller])
    return found


def _mean(values: Any) -> dict[str, list[float]]:
    """Reduce values (trials, ranks) to the mean of each rank and its standard error."""
    spread = values.std(axis=0, ddof=1) / math.sqrt(len(values))
    return {"mean": values.mean(axis=0).round(6).tolist(), "standard_error": spread.round(7).tolist()}


def verdicts(report: dict[str, Any]) -> dict[str, Any]:
    """Return where the simulation breaks Theorem 1's order, where it ends by the integrals, and the gap between F3 and DCT."""
    broken = []
    for size, part in report["parts"].items():
        for place, rank in enumerate(part["ranks"]):
            means = [part["errors"][method]["mean"][place] for method in (RANDOM_CELLS, SVD, CELLS, PARTS)]
            if sorted(means, reverse=True) != means:
                broken.append(f"K={size}, r={rank}")
    apart = [
        abs(mean) / spread
        for part in report["parts"].values()
        for mean, spread in zip(*part["differences"][f"{PARTS} - {DCT}"].values(), strict=True)
    ]
    ends = {f"{smaller} < {larger}": crossing(smaller, larger) for smaller, larger in CLAIMS}
    return {"order_broken_at": broken, "order_ends_at_rank_over_size": ends, "f3_and_dct_apart_in_standard_errors": max(apart)}


def draw(report: dict[str, Any], path: Path) -> None:
    """Plot errors over that of the SVD by K and by r, as in Figures 6 and 7, and errors over K^2 by r / K."""
    figure = Figure(figsize=(12.5, 4.4), layout="constrained")
    by_size, by_rank, by_share = figure.subplots(1, 3, width_ratios=(1, 1, 1.3))
    sizes = sorted(int(size) for size in report["parts"])
    first, largest = report["settings"]["ranks"][0], str(sizes[-1])
    small = sizes[:-1] or sizes
    _draw_ratios(by_size, small, [_at(report, size, first) for size in small], "K", f"r = {first}")
    ranks = report["settings"]["ranks"]
    _draw_ratios(by_rank, ranks, [_at(report, sizes[-1], rank) for rank in ranks], "r", f"K = {largest}")
    _draw_shares(by_share, report)
    lines, labels = by_share.get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    save(figure, path)


def _at(report: dict[str, Any], size: int, rank: int) -> dict[str, dict[str, float]]:
    """Return the mean, standard error and integral of each method at one size and rank."""
    part = report["parts"][str(size)]
    place = part["ranks"].index(rank)
    return {method: {name: values[place] for name, values in part["errors"][method].items()} for method in METHODS}


def _draw_ratios(axes: Axes, places: Sequence[int], found: list[dict[str, dict[str, float]]], label: str, title: str) -> None:
    for method in METHODS:
        for kind, style in (("integral", "-"), ("mean", "o")):
            ratios = [one[method][kind] / one[SVD][kind] for one in found]
            axes.plot(places, ratios, style, color=COLOURS[method], markersize=4)
    plain(axes).set(xlabel=label, ylabel="error / error of the SVD", title=title)


def _draw_shares(axes: Axes, report: dict[str, Any]) -> None:
    shares = np.linspace(0.002, 0.748, 200)
    curves = [limit_errors(share) for share in shares]
    for method in METHODS:
        style = "--" if method == DCT else "-"
        axes.plot(shares, [one[method] for one in curves], style, color=COLOURS[method], label=method)
        for size, part in report["parts"].items():
            places = [rank / int(size) for rank in part["ranks"]]
            axes.plot(places, part["errors"][method]["mean"], "o", color=COLOURS[method], markersize=3, alpha=0.6)
    axes.axvline(1 / 3, color="black", linewidth=0.8, linestyle=":")
    axes.text(1 / 3, 0.95, " r = K / 3", fontsize=9)
    plain(axes).set(xlabel="r / K", ylabel="error / K²", title="lines: integrals; points: simulation", ylim=(0, 1))


def table(report: dict[str, Any]) -> str:
    rows = [["K", "r", *METHODS]]
    for size, part in report["parts"].items():
        for place, rank in enumerate(part["ranks"]):
            means = [part["errors"][method]["mean"][place] for method in METHODS]
            rows.append([size, str(rank), *(f"{mean:.4f}" for mean in means)])
    return aligned(rows, str.rjust)


def reproduce(settings: Settings) -> None:
    file = settings.output / "theorems.json"
    report = measure_parts(file, settings, [str(size) for size in settings.sizes], lambda size: measure(int(size), settings))
    report["verdicts"] = verdicts(report)
    write_report(file, report)
    draw(report, settings.output / "theorems.png")
    print(table(report))
    print(told(report["verdicts"], settings.trials))


def told(found: dict[str, Any], trials: int) -> str:
    lines = [
        f"Errors over K², means of {trials} matrices. Theorem 1's order is broken at {found['order_broken_at'] or 'no point'}."
    ]
    for claim, share in found["order_ends_at_rank_over_size"].items():
        lines.append(f"By the integrals, {claim} " + (f"up to r / K = {share:.3f}" if share else "at every r / K below 3/4"))
    lines.append(f"F3 and DCT differ by at most {found['f3_and_dct_apart_in_standard_errors']:.1f} standard errors.")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    return run(SCRIPT, Settings, reproduce, arguments)


if __name__ == "__main__":
    sys.exit(main())
