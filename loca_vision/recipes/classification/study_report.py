"""A comparison of several methods: a table, and a picture of accuracy against trained parameters."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

from loca_vision.methods.registry import KINDS
from loca_vision.recipes.reports import plots

_MARKS = "osv^DP*X<>"  # markers of the methods with an adapter, in order
_WHOLE = {"lp": ":", "full": "--"}  # line styles of the methods without an adapter


@dataclass(frozen=True)
class Point:
    """One method at one budget.

    Args:
        name: the method, and what distinguishes this point.
        trained: number of trained parameters without the head; coefficients, not locations.
        rate: the learning rate that was best on validation.
        validation: accuracy at every rate tried, with the first seed.
        test: accuracy of each seed at that rate.
        seconds: time of a step, averaged over the seeds.
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
    def title(self) -> str:
        """The method's title for sentences; anything but a single method keeps its name."""
        name, fixed = self.method.removesuffix("-fixed"), self.method.endswith("-fixed")
        title = KINDS[name].title or name if name in KINDS else name
        return f"{title}, fixed locations" if fixed else title

    @property
    def mean(self) -> float:
        return statistics.fmean(self.test)

    @property
    def deviation(self) -> float:
        """Standard deviation of a sample; 0 for a single run."""
        return statistics.stdev(self.test) if len(self.test) > 1 else 0.0


def study_table(points: Sequence[Point], seeds: Sequence[int]) -> str:
    """Return Markdown: a row for each method and budget, accuracies in percent."""
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


def study_text(points: Sequence[Point], seeds: Sequence[int], against: str) -> str:
    """Return Markdown: the table of all points and, with several seeds, differences to one method and to fixed locations.

    Args:
        against: the method to compare with, at its point with the fewest numbers.
    """
    text = study_table(points, seeds)
    floors = sorted((point for point in points if point.method == against), key=lambda point: point.trained)
    if len(seeds) > 1 and floors:
        others = [point for point in points if point is not floors[0]]
        text += f"\n{_DIFFERENCES} {floors[0].name}\n\n" + _differences([(point, floors[0]) for point in others])
    fixed = {point.trained: point for point in points if point.method.endswith("-fixed")}
    pairs = [(point, fixed[point.trained]) for point in points if f"{point.method}-fixed" in {one.method for one in points}]
    if len(seeds) > 1 and pairs:
        text += f"\n{_DIFFERENCES} fixed locations of as many numbers\n\n" + _differences(pairs)
    return text


_DIFFERENCES = "Accuracy in points, seed by seed, less that of"


def _differences(pairs: Sequence[tuple[Point, Point]]) -> str:
    lines = ["| method | trained numbers | mean difference | 95 % interval |", "|---|---|---|---|"]
    for point, other in pairs:
        mean, half = paired_difference(point.test, other.test)
        low, high = 100 * (mean - half), 100 * (mean + half)
        lines.append(f"| {point.method} | {point.trained:,} | {100 * mean:+.2f} | {low:+.2f} to {high:+.2f} |")
    return "\n".join(lines) + "\n"


def paired_difference(one: Sequence[float], other: Sequence[float]) -> tuple[float, float]:
    """Return the mean difference of paired runs by seed, and half the width of its 95 % interval by Student's t."""
    from scipy.stats import t

    differences = [a - b for a, b in zip(one, other, strict=True)]
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    return statistics.fmean(differences), float(t.ppf(0.975, len(differences) - 1)) * error


def draw_study(path: Path, title: str, points: Sequence[Point]) -> None:
    """Draw mean test accuracy, with one standard deviation, against trained numbers and against bytes of the file; methods
    without an adapter are lines."""
    figure = Figure(figsize=(11, 5), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    _draw(left, points, "trained")
    _draw(right, points, "size")
    left.set(ylabel="test accuracy, %", xlabel="trained numbers without the head")
    right.set(xlabel="bytes of the file, head included")
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper")
    figure.suptitle(title)
    plots.save(figure, path)


def _draw(axes: Axes, points: Sequence[Point], measure: Literal["trained", "size"]) -> None:
    adapters = list(dict.fromkeys(point.method for point in points if point.method not in _WHOLE))
    for whole in (point for point in points if point.method in _WHOLE):
        label = f"full, {whole.trained / 1e6:.1f} M" if whole.method == "full" else "head alone"
        axes.axhline(100 * whole.mean, color="#7f7f7f", linestyle=_WHOLE[whole.method], label=label)
    for number, method in enumerate(adapters):
        mine = sorted((point for point in points if point.method == method), key=lambda point: point.trained)
        aside = 1.015 ** (number - (len(adapters) - 1) / 2)  # shifts points that would coincide
        axes.errorbar(
            [getattr(point, measure) * aside for point in mine],
            [100 * point.mean for point in mine],
            yerr=[100 * point.deviation for point in mine],
            marker=_MARKS[number % len(_MARKS)],
            color=f"C{number}",
            markersize=5,
            linewidth=1.2,
            capsize=2,
            label=mine[0].title,
        )
    places = [getattr(point, measure) for point in points if point.method not in _WHOLE]
    axes.set_xscale("log")
    axes.set_xlim(min(places, default=1) / 1.5, max(places, default=1) * 1.5)  # much wider than the shifts above
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3)
