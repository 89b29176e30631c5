"""The picture of update_statistics.py: entries, eigenvalues and errors of weight updates, compared with theory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import norm

from common import plain
from loca_vision.recipes.reports.plots import save
from marchenko_pastur import bounds, density, eigenvalues
from weight_updates import WeightUpdates

COLOURS = ("#0b6e99", "#d1603d", "#3a923a", "#7b3294", "#d9a420", "#8c8c8c", "#1b1b1b")
SHOWN = ("nearest to the law", "median", "farthest")
SHOWN_COLOURS = ("#0b6e99", "#d9a420", "#d1603d")
RIGHT = 6.0  # end of the eigenvalue axis: 1.5 times the law's largest bound


def draw(report: dict[str, Any], kinds: Mapping[str, str], updates: WeightUpdates, path: Path) -> None:
    figure = Figure(figsize=(11.5, 6.6), layout="constrained")
    ((entries, variation, p_values), (spectra, largest, errors)) = figure.subplots(2, 3)
    parts = report["parts"]
    draw_shown(entries, spectra, parts, updates)
    by_kind(variation, parts, kinds, lambda part: part["total_variation"])
    variation.axhline(report["settings"]["epsilon"], color="black", linewidth=0.8, linestyle=":", label="epsilon")
    plain(variation).set(ylim=(0, None), ylabel="total variation to a normal law", title="entries")
    by_kind(p_values, parts, kinds, lambda part: part["p_value"])
    p_values.axhline(0.05, color="black", linewidth=0.8, linestyle=":")
    plain(p_values).set(ylim=(-0.03, 1.03), ylabel="p-value", title="normality test (dotted: 0.05)")
    by_kind(largest, parts, kinds, lambda part: part["spectrum"]["largest_over_bound"])
    largest.axhline(1, color="black", linewidth=0.8, linestyle=":")
    plain(largest).set(yscale="log", ylabel="largest eigenvalue / bound", title="eigenvalues (dotted: the law)")
    by_kind(errors, parts, kinds, lambda part: part["errors"]["dct"] / part["errors"]["rank"])
    errors.axhline(1, color="black", linewidth=0.8, linestyle=":")
    plain(errors).set(ylabel=f"error of the DCT / of rank {report['settings']['rank']}", title="below 1 the DCT is better")
    figure.legend(*p_values.get_legend_handles_labels(), loc="outside lower center", ncols=8, frameon=False)
    save(figure, path)


def by_kind(axes: Axes, parts: dict[str, Any], kinds: Mapping[str, str], value: Any) -> None:
    """Plot a value of each matrix in the order of the file, with a line for each kind."""
    for place, kind in enumerate(dict.fromkeys(kinds.values())):
        values = [value(parts[name]) for name in parts if kinds.get(name) == kind]
        colour = COLOURS[place % len(COLOURS)]
        axes.plot(range(len(values)), values, "o-", label=kind, color=colour, markersize=4, linewidth=1)
    axes.set_xlabel("block")


def draw_shown(entries: Axes, spectra: Axes, parts: dict[str, Any], updates: WeightUpdates) -> None:
    """Plot entries and eigenvalues of three matrices: those whose largest eigenvalue is smallest, median and largest."""
    order = sorted(parts, key=lambda name: parts[name]["spectrum"]["largest_over_bound"])
    names = dict.fromkeys([order[0], order[len(order) // 2], order[-1]])
    for name, which, colour in zip(names, SHOWN, SHOWN_COLOURS, strict=False):
        update = updates.update(name)
        scaled = (update - update.mean()) / update.std()
        outline(entries, scaled.ravel(), np.linspace(-6, 6, 121), colour, f"{name} ({which})")
        values, aspect = eigenvalues(update)
        places = np.linspace(0.02, bounds(aspect)[1], 400)
        outline(spectra, values, np.linspace(0, RIGHT, 81), colour)
        spectra.plot(places, density(places, aspect), color=colour, linestyle=":", linewidth=1)
    grid = np.linspace(-6, 6, 241)
    entries.plot(grid, norm.pdf(grid), color="black", linestyle=":", linewidth=1)
    entries.legend(fontsize=7, frameon=False, loc="lower center")
    plain(entries).set(yscale="log", ylim=(2e-8, 1), xlabel="deviations", title="entries (dotted: normal)")
    plain(spectra).set(xlim=(0, RIGHT), ylim=(0, 2), xlabel="eigenvalue", title="eigenvalues (dotted: Marchenko-Pastur)")


def outline(axes: Axes, values: Any, edges: Any, colour: str, label: str | None = None) -> None:
    """Plot the density of all values as a histogram; values beyond its edges count, but are not shown."""
    counts, _ = np.histogram(values, edges)
    axes.stairs(counts / len(values) / np.diff(edges), edges, color=colour, linewidth=1.3, label=label)
