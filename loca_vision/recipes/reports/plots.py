"""Pictures of a run: its curves, and where the components of the spectra moved."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from loca_vision.methods.spectrum import Spectrum
from loca_vision.recipes.training.fine_tune import Step
from loca_vision.storage.atomic_file import write_atomically

COLOURS = ("#7f7f7f", "#1f6fb4", "#d1542c", "#3a923a")
MOST_PANELS = 96
DPI = 130
MOVING = ("locations", "both")  # the phases in which locations move


@dataclass(frozen=True)
class Travel:
    """One projection's components at the start and at the end: (B, 2) rows and columns, in cells, not rounded."""

    name: str
    shape: tuple[int, int]
    start: Tensor
    end: Tensor

    @property
    def distance(self) -> Tensor:
        """(B,) cells travelled: the larger of the distances in rows and in columns."""
        return (self.end - self.start).abs().amax(1)

    @property
    def moved(self) -> Tensor:
        """(B,) whether a component ended in another cell than it started in."""
        return (self.end.round() != self.start.round()).any(1)


def positions(spectrum: Spectrum) -> Tensor:
    """Return the locations of the components in cells, (B, 2): a copy on the CPU."""
    return spectrum.locations.detach().cpu() * (torch.tensor(spectrum.shape) - 1)


def draw_curves(path: Path, title: str, runs: Mapping[str, tuple[Sequence[Step], float]]) -> None:
    """Draw the loss by step, smoothed over the raw one, and each method's test accuracy; runs: method -> (steps, accuracy)."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    losses, bars = figure.subplots(1, 2, width_ratios=(3, 1))
    for colour, (method, (steps, _)) in zip(COLOURS, runs.items(), strict=False):
        numbers, values = [step.number for step in steps], [step.loss for step in steps]
        losses.plot(numbers, values, color=colour, alpha=0.25, linewidth=0.8)
        losses.plot(numbers, _smooth(values), color=colour, label=method)
        _shade([step.number for step in steps if step.phase in MOVING], losses)
    losses.set(xlabel="optimiser step", ylabel="training loss", yscale="log", title=title)
    losses.legend()
    values = [result for _, result in runs.values()]
    drawn = bars.bar(list(runs), values, color=COLOURS[: len(runs)])
    bars.bar_label(drawn, [f"{100 * value:.1f} %" for value in values])
    bars.set(ylim=(0, 1.08), title="test accuracy")
    save(figure, path)


def draw_run(path: Path, title: str, curve: Mapping[str, Sequence[Any]], epochs: Sequence[Mapping[str, float]]) -> None:
    """Draw the loss by step, smoothed over the raw one, and the validation accuracy by epoch.

    Args:
        curve: "loss" and "phase" of each step.
        epochs: "epoch", from 1, and "validation_accuracy" of each.
    """
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    losses, validation = figure.subplots(1, 2, width_ratios=(3, 2))
    _loss_of(curve, losses, title)
    accuracies = [100 * epoch["validation_accuracy"] for epoch in epochs]
    validation.plot([epoch["epoch"] for epoch in epochs], accuracies, color=COLOURS[2], marker="o")
    _whole_ticks(validation, len(epochs))
    validation.set(xlabel="epoch", ylabel="%", title=f"validation accuracy, best {max(accuracies):.1f} %")
    save(figure, path)


def draw_loss(path: Path, title: str, curve: Mapping[str, Sequence[Any]]) -> None:
    """Draw the loss by step, smoothed over the raw one; the curve has "loss" and "phase" of each step."""
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    _loss_of(curve, figure.subplots(), title)
    save(figure, path)


def _loss_of(curve: Mapping[str, Sequence[Any]], axes: Any, title: str) -> None:
    numbers = range(1, len(curve["loss"]) + 1)
    axes.plot(numbers, curve["loss"], color=COLOURS[1], alpha=0.25, linewidth=0.8)
    marker = "o" if len(curve["loss"]) == 1 else None  # a line needs two points
    axes.plot(numbers, _smooth(curve["loss"]), color=COLOURS[1], marker=marker, label="training loss")
    _shade([number for number, phase in zip(numbers, curve["phase"], strict=True) if phase in MOVING], axes)
    axes.set(xlabel="optimiser step", ylabel="training loss", yscale="log", title=title)
    axes.legend()
    _whole_ticks(axes, len(curve["loss"]))


def _whole_ticks(axes: Any, count: int) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if count == 1:
        axes.set_xlim(0, 2)


def draw_confusion(path: Path, matrix: Tensor, classes: Sequence[str]) -> None:
    """Draw how often each class (row) was predicted as each class (column): matrix (n, n) of counts, shaded by shares of the
    row, on a scale that shows rare mistakes."""
    count = len(classes)
    side = min(24.0, 3.5 + 0.3 * count)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    shares = (matrix / matrix.sum(1, keepdim=True).clamp(min=1)).numpy()
    drawn = axes.imshow(shares, cmap="YlGnBu", norm=PowerNorm(0.5, vmin=0, vmax=1))
    size = max(3.0, min(9.0, 300 / count))
    axes.set_xticks(range(count), classes, rotation=90, fontsize=size)
    axes.set_yticks(range(count), classes, fontsize=size)
    axes.set(xlabel="taken for", ylabel="class", title=f"{int(matrix.diagonal().sum())} of {int(matrix.sum())} right")
    for row, col in matrix.nonzero().tolist() if count <= 40 else ():
        colour = "white" if shares[row, col] > 0.3 else "black"
        axes.text(col, row, str(int(matrix[row, col])), ha="center", va="center", fontsize=size * 0.8, color=colour)
    figure.colorbar(drawn, ax=axes, label="share of the class", shrink=0.7, fraction=0.04, pad=0.01)
    save(figure, path)


def draw_spectrum(path: Path, travels: Sequence[Travel]) -> None:
    """Draw where the components of each projection ended, coloured by how many cells they travelled."""
    shown = travels[:MOST_PANELS]
    across = min(len(shown), 8)
    down = math.ceil(len(shown) / across)
    figure = Figure(figsize=(2.1 * across + 1, 2.2 * down + 1), layout="constrained")
    panels = figure.subplots(down, across, squeeze=False).flat
    furthest = max(float(travel.distance.max()) for travel in travels) or 1.0
    for panel, travel in zip(panels, shown, strict=False):
        order = travel.distance.argsort()  # components that travelled are drawn on top
        rows, cols = travel.end[order].T
        points = panel.scatter(cols, rows, c=travel.distance[order], s=2, cmap="YlGnBu", vmin=0, vmax=furthest)
        panel.set_title(f"{travel.name}\n{100 * travel.moved.float().mean().item():.0f} % in another cell", fontsize=7)
        panel.set(xlim=(-1, travel.shape[1]), ylim=(travel.shape[0], -1), xticks=[], yticks=[], aspect="equal")
    for empty in list(panels):
        empty.set_axis_off()
    rest = f" (the first {len(shown)} of {len(travels)})" if len(shown) < len(travels) else ""
    figure.suptitle(f"Final locations in each projection's spectrum, low frequencies at the top left{rest}")
    figure.colorbar(points, ax=figure.axes, label="cells travelled", shrink=0.6, pad=0.01)
    save(figure, path)


def _smooth(values: Sequence[float], window: int = 10) -> list[float]:
    """Return the mean of each value and those before it, over at most `window` values."""
    return [sum(values[max(0, i - window + 1) : i + 1]) / min(window, i + 1) for i in range(len(values))]


def _shade(moving: Sequence[int], axes: Any) -> None:
    """Mark the steps in which locations moved."""
    for number in moving:
        label = "locations move" if number == moving[0] else None
        axes.axvspan(number - 0.5, number + 0.5, color="#f2d7a0", alpha=0.5, linewidth=0, label=label)


def save(figure: Figure, path: Path) -> None:
    """Save a figure as PNG, either completely or not at all."""
    # The figure gets its own Agg canvas: no window system, and no global state of pyplot.
    picture = BytesIO()
    FigureCanvasAgg(figure).print_figure(picture, dpi=DPI, format="png")
    write_atomically(path, picture.getvalue())
