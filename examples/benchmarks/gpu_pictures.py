"""Bar charts of a run on a GPU: step time and kernel launches relative to the floor, workload by workload."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from contenders import FLOOR
from gpu_workloads import title
from loca_vision.recipes.reports.plots import save
from rounds import ratio

Run = Mapping[str, Any]
ACROSS = 4  # workloads in a row
COLOURS = {
    "LoCA, coefficients": "#1f6fb4",
    "LoCA, coefficients, whole": "#6aa5d8",
    "LoCA, coefficients, together": "#b3d1ec",
    "LoCA, locations": "#d1542c",
    "LoCA, locations, whole": "#e8906f",
    "LoCA, locations, together": "#f6c9b7",
    "LoRA": "#3a923a",
    "LoRA, peft": "#94cf94",
    "FourierFT": "#7a4fa3",
    "FourierFT, peft": "#b9a2d3",
}


def drawn(folder: Path, found: Run) -> dict[str, str | None]:
    """Draw the pictures that have figures; return, by name, None or why a picture is missing."""
    steps = {
        name: own for name, own in found["parts"].get("steps", {}).items() if isinstance(own, Mapping) and "methods" in own
    }
    pictures: dict[str, tuple[str, Callable[[Run, Run], float | None]]] = {
        "steps": ("time of a training step, of the frozen model's", _time),
        "launches": ("kernel launches of a training step, of the frozen model's", _launches),
    }
    made: dict[str, str | None] = {}
    for name, (label, value) in pictures.items():
        bars = {workload: _relative(own["methods"], value) for workload, own in steps.items()}
        bars = {workload: own for workload, own in bars.items() if own}
        made[name] = None if bars else "no figures"
        if bars:
            draw(folder / f"{name}.png", label, bars)
    return made


def _relative(methods: Run, value: Callable[[Run, Run], float | None]) -> dict[str, float]:
    floor = methods.get(FLOOR, {})
    ratios = {_family(name): value(row, floor) for name, row in methods.items() if name != FLOOR}
    return {name: found for name, found in ratios.items() if found is not None}


def _family(name: str) -> str:
    """Remove the numbers that differ between models from a method's name."""
    return re.sub(r" [rn]=\d+", "", name)


def _time(row: Run, floor: Run) -> float | None:
    own, least = row.get("seconds"), floor.get("seconds")
    return ratio(own, least) if own and least and len(own) == len(least) else None


def _launches(row: Run, floor: Run) -> float | None:
    (own, least) = (sum(one.get("launches", {}).get(kind, 0) for kind in ("kernels", "operators")) for one in (row, floor))
    return own / least if own and least else None


def draw(path: Path, label: str, bars: Mapping[str, Mapping[str, float]]) -> None:
    """Draw a group of bars for each workload, with a colour for each method."""
    present = {name for own in bars.values() for name in own}
    names = sorted(present, key=lambda name: (list(COLOURS).index(name) if name in COLOURS else len(COLOURS), name))
    down = math.ceil(len(bars) / ACROSS)
    figure = Figure(figsize=(11, 1.2 + 3.1 * down), layout="constrained")
    for row, axes in enumerate(figure.subplots(down, squeeze=False, sharey=True)[:, 0]):
        shown = dict(list(bars.items())[row * ACROSS : (row + 1) * ACROSS])
        _groups(axes, names, shown)
    figure.suptitle(label)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    save(figure, path)


def _groups(axes: Any, names: Sequence[str], bars: Mapping[str, Mapping[str, float]]) -> None:
    width = 0.9 / len(names)
    for number, name in enumerate(names):
        places = [place + (number - (len(names) - 1) / 2) * width for place, own in enumerate(bars.values()) if name in own]
        heights = [own[name] for own in bars.values() if name in own]
        drawn = axes.bar(places, heights, width, color=COLOURS.get(name, "#7f7f7f"), label=name)
        axes.bar_label(drawn, [f"{height:.2f}" for height in heights], rotation=90, fontsize=6.5, padding=2)
    axes.axhline(1, color="#333333", linewidth=0.8)
    axes.set_xticks(range(len(bars)), map(title, bars), fontsize=8)
    axes.set_xlim(-0.5, ACROSS - 0.5)
    axes.margins(y=0.15)
