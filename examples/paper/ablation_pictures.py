"""The pictures of ablation.py: Table 5, Figures 2 and 4, and the moves of the locations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure

from ablation_settings import FIXED, STILL, WHOLE
from common import plain
from loca_vision.recipes.reports.plots import save
from location_moves import Moves

BLUE, ORANGE, GREY = "#0b6e99", "#d1603d", "#8c8c8c"
COLOURS = (BLUE, ORANGE, "#3a923a", "#7b3294", "#d9a420")
WINDOW = 10  # steps over which differences of losses are averaged


def draw_ablation(report: dict[str, Any], path: Path) -> None:
    """Plot the differences of Table 5, those of the loss by step (Figure 2), and accuracy by alpha and by B_s (Figure 4)."""
    figure = Figure(figsize=(12.5, 8), layout="constrained")
    ((table, losses), (alphas, steps)) = figure.subplots(2, 2)
    _draw_table(table, report)
    _draw_losses(losses, report)
    loca, variants = report["loca"], report["variants"]
    total = len(report["loss_less_still"][loca]["by_step"])
    by_alpha = {float(name.split()[1]): own for name, own in variants.items() if name.startswith("alpha ")}
    alphas.set_xscale("log")
    _draw_choice(alphas, by_alpha | {1.0: variants[loca]}, "alpha, at one learning rate")
    by_steps = {float(name.split()[1]): own for name, own in variants.items() if name.startswith("B_s ")}
    ends = {0.0: variants[FIXED], float(total): variants[WHOLE]}
    own = {float(report["settings"]["learning_steps"]): variants[loca]}
    _draw_choice(steps, ends | by_steps | own, f"B_s; 0: V1, {total}: V2")
    save(figure, path)


def _draw_table(axes: Axes, report: dict[str, Any]) -> None:
    """Plot accuracy minus that of V1 with 95 % intervals; each small point is one seed's difference."""
    variants = report["variants"]
    names = [name for name in variants if name != FIXED and not name.startswith(("alpha", "B_s"))]
    base = np.array(variants[FIXED]["test"])
    for place, name in enumerate(names):
        mean, low, high = variants[name]["test_less_v1"]
        colour = GREY if name.endswith(STILL) else BLUE
        axes.errorbar([place], [mean], [[mean - low], [high - mean]], fmt="o", color=colour, capsize=4)
        seeds = np.array(variants[name]["test"]) - base
        axes.plot([place + 0.2] * len(seeds), seeds, ".", color=colour, alpha=0.5, markersize=4)
    axes.axhline(0, color="black", linewidth=0.8, linestyle=":")
    axes.set_xticks(range(len(names)), [name.replace(" ", "\n") for name in names])
    plain(axes).set(ylabel="test accuracy less V1's, points", title="Table 5: paired by seed, mean and 95 % interval")


def _draw_losses(axes: Axes, report: dict[str, Any]) -> None:
    for colour, (name, found) in zip(COLOURS, report["loss_less_still"].items(), strict=False):
        values = _smooth(found["by_step"])
        axes.plot(np.arange(len(values)) + 1, values, color=colour, label=name, linewidth=1.3)
    axes.axvspan(10.5, 30.5, color="#f3e3b3", zorder=0, linewidth=0)
    axes.axhline(0, color="black", linewidth=0.8, linestyle=":")
    axes.legend(frameon=False)
    title = f"Figure 2: mean over seeds and {WINDOW} steps; shaded: LoCA moves"
    plain(axes).set(xlabel="step", ylabel='training loss less that of "still"', title=title)


def _smooth(values: Sequence[float]) -> np.ndarray[Any, Any]:
    """Return the mean of each value and up to WINDOW - 1 values before it."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(sums))
    begins = np.maximum(0, ends - WINDOW)
    return np.asarray((sums[ends] - sums[begins]) / (ends - begins))


def _draw_choice(axes: Axes, variants: Mapping[float, Mapping[str, Any]], label: str) -> None:
    """Plot the test accuracy of every seed, and the mean, by the value of a setting."""
    places = sorted(variants)
    values = np.array([variants[place]["test"] for place in places])
    axes.plot(places, values, ".", color=GREY, markersize=5)
    axes.plot(places, values.mean(1), "o-", color=BLUE)
    axes.set_xticks(places, [f"{place:g}" for place in places])
    axes.minorticks_off()
    plain(axes).set(xlabel=label, ylabel="test accuracy, %", title="Figure 4: every seed, and the mean")


def draw_moves(name: str, run: Sequence[Moves], path: Path) -> None:
    """Plot cells of up to six layers of one run before (grey) and after (coloured by distance); low frequencies top left."""
    shown = [run[i] for i in sorted({round(place) for place in np.linspace(0, len(run) - 1, 6)})]
    across = -(-len(shown) // 2)
    figure = Figure(figsize=(1.8 * across + 1, 4.3), layout="constrained")
    panels = list(figure.subplots(2, across, squeeze=False).flat)
    farthest = max(1, *(int(moves.distance.max()) for moves in shown))
    for panel, moves in zip(panels, shown, strict=False):
        segments = np.stack([moves.start[:, ::-1], moves.end[:, ::-1]], 1)
        panel.add_collection(LineCollection(list(segments), colors="#c4c4c4", linewidths=0.4, antialiaseds=False))
        panel.scatter(*moves.start.T[::-1], s=1, color=GREY, linewidths=0)
        drawn = panel.scatter(*moves.end.T[::-1], s=5, c=moves.distance, cmap="viridis_r", vmin=0, vmax=farthest, linewidths=0)
        panel.set(xlim=(-2, moves.shape[1] + 1), ylim=(moves.shape[0] + 1, -2), xticks=[], yticks=[], aspect="equal")
        panel.set_title(f"{moves.name}\n{100 * (moves.distance > 0).mean():.0f} % moved", fontsize=8)
    for empty in panels[len(shown) :]:
        empty.set_axis_off()
    figure.suptitle(f"{name}: start (grey) and end of every component", fontsize=10)
    figure.colorbar(drawn, ax=panels, label="cells moved", shrink=0.7, pad=0.01)
    save(figure, path)
