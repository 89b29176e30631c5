"""Bar charts of a run on a GPU: step time and kernel launches relative to the floor, workload by workload."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from contenders import FLOOR
from gpu_workloads import title
from loca_vision.recipes.reports.plots import save
from rounds import ratio

Run = Mapping[str, Any]
HUES = ("#1f6fb4", "#7fb2dd", "#d1542c", "#f0a78f", "#3a923a", "#94cf94", "#7a4fa3", "#b9a2d3", "#8c6d31", "#7f7f7f")


def drawn(folder: Path, found: Run) -> dict[str, str | None]:
    """The pictures for which there are figures; by name None, or why there is none."""
    steps = {name: own for name, own in found["parts"].get("steps", {}).items() if isinstance(own, Mapping) and "methods" in own}
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
    """Without the numbers that differ from model to model."""
    words = [word for word in name.split(" ") if not word.startswith(("r=", "n="))]
    return f"{' '.join(words)}, peft" if name.endswith(", peft") and not words[-1] == "peft" else " ".join(words)


def _time(row: Run, floor: Run) -> float | None:
    own, least = row.get("seconds"), floor.get("seconds")
    return ratio(own, least) if own and least and len(own) == len(least) else None


def _launches(row: Run, floor: Run) -> float | None:
    (own, least) = (sum(one.get("launches", {}).get(kind, 0) for kind in ("kernels", "operators")) for one in (row, floor))
    return own / least if own and least else None


def draw(path: Path, label: str, bars: Mapping[str, Mapping[str, float]]) -> None:
    """A group of bars for each workload, a colour for each method."""
    names = list(dict.fromkeys(name for own in bars.values() for name in own))
    figure = Figure(figsize=(1.5 + 2.1 * max(2, len(bars)), 5.2), layout="constrained")
    axes = figure.subplots()
    width = 0.86 / len(names)
    for number, name in enumerate(names):
        places = [place for place, own in enumerate(bars.values()) if name in own]
        heights = [own[name] for own in bars.values() if name in own]
        middles = [place + (number - (len(names) - 1) / 2) * width for place in places]
        drawn = axes.bar(middles, heights, width, color=HUES[number % len(HUES)], label=name)
        axes.bar_label(drawn, [f"{height:.2f}" for height in heights], rotation=90, fontsize=6.5, padding=2)
    axes.axhline(1, color="#333333", linewidth=0.8)
    axes.set_xticks(range(len(bars)), [title(name).replace(", ", "\n", 1) for name in bars], fontsize=8)
    axes.set(title=label)
    axes.margins(y=0.12)
    figure.legend(loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    save(figure, path)
