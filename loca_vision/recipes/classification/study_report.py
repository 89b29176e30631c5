"""Several methods compared: a table, and a picture of accuracy against trained parameters."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from loca_vision.recipes.reports import plots

_MARKS = "osv^DP*X<>"  # of the methods with an adapter, in their order


@dataclass(frozen=True)
class Point:
    """One method at one budget.

    Args:
        name: the method, and what sets it apart.
        trained: parameters without the head; coefficients, not locations.
        rate: the learning rate that was best on validation.
        validation: accuracy at every rate tried, with the first seed.
        test: accuracy of each seed at that rate.
        seconds: a step, mean over the seeds.
        size: bytes of the file.
    """

    name: str
    trained: int
    rate: float
    validation: dict[float, float]
    test: tuple[float, ...]
    seconds: float
    size: int

    @staticmethod
    def of(name: str, rate: float, validation: Mapping[float, float], runs: Sequence[Mapping[str, Any]]) -> Point:
        seconds = statistics.fmean(run["seconds_per_step"] for run in runs)
        test = tuple(run["test_accuracy"] for run in runs)
        return Point(name, runs[0]["trained_parameters"], rate, dict(validation), test, seconds, runs[0]["adapter_bytes"])

    @property
    def method(self) -> str:
        """The name without the budget."""
        return self.name.rstrip("0123456789").rstrip("-")

    @property
    def mean(self) -> float:
        return statistics.fmean(self.test)

    @property
    def deviation(self) -> float:
        """Standard deviation of a sample; 0 of a single run."""
        return statistics.stdev(self.test) if len(self.test) > 1 else 0.0


def study_table(points: Sequence[Point], seeds: Sequence[int]) -> str:
    """Markdown: a row for each method and budget, accuracies in percent."""
    of = "/".join(map(str, seeds))
    lines = [
        "| method | trained numbers | rate "
        f"| validation at each, seed {seeds[0]} | test, seeds {of} | mean ± std | s/step | bytes |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for point in points:
        tried = ", ".join(f"{rate:.2g}: {100 * accuracy:.1f}" for rate, accuracy in sorted(point.validation.items()))
        tests = " / ".join(f"{100 * accuracy:.1f}" for accuracy in point.test)
        mean = f"{100 * point.mean:.2f} ± {100 * point.deviation:.2f}"
        lines.append(
            f"| {point.method} | {point.trained:,} | {point.rate:.2g} | {tried} | {tests} | {mean} | "
            f"{point.seconds:.2f} | {point.size:,} |"
        )
    return "\n".join(lines) + "\n"


def draw_study(path: Path, title: str, points: Sequence[Point]) -> None:
    """Mean test accuracy, with one standard deviation, against trained numbers; methods without an adapter as lines."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    adapters = list(dict.fromkeys(point.method for point in points if point.method not in ("lp", "full")))
    for method in dict.fromkeys(point.method for point in points):
        mine = sorted((point for point in points if point.method == method), key=lambda point: point.trained)
        if method in ("lp", "full"):
            style = ":" if method == "lp" else "--"
            label = "head alone" if method == "lp" else f"full, {mine[0].trained / 1e6:.1f} M"
            axes.axhline(100 * mine[0].mean, color="#7f7f7f", linestyle=style, label=label)
            continue
        aside = 1.04 ** (adapters.index(method) - (len(adapters) - 1) / 2)  # of those at the same place
        axes.errorbar(
            [point.trained * aside for point in mine],
            [100 * point.mean for point in mine],
            yerr=[100 * point.deviation for point in mine],
            marker=_MARKS[adapters.index(method) % len(_MARKS)],
            capsize=3,
            label=method,
        )
    axes.set(xscale="log", xlabel="trained numbers beside the head", ylabel="test accuracy, %", title=title)
    budgets = sorted({point.trained for point in points if point.method in adapters})
    if budgets:
        axes.set_xlim(budgets[0] / 1.4, budgets[-1] * 1.4)
        axes.set_xticks(budgets, [f"{budget:,}" for budget in budgets])
        axes.set_xticks([], minor=True)
    figure.legend(loc="outside right upper")
    plots.save(figure, path)
