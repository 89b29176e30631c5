"""How the cost of one training step grows with components, width and tokens: LoCA, LoRA, peft's FourierFT, and the lower bound.

The model is a single square linear layer, forward and backward with a gradient at its input, so that an adapter's cost is not
hidden behind the rest of a network; with `--model block`, it is a ViT block, which does six times the work of its query and
value. The lower bound is the frozen model. A method counts as free if its median ratio to the lower bound is at most 1.05, and
as cheap as LoRA if its median ratio to LoRA is. Every method takes a turn in every round; with one thread, seconds are CPU
time, so that other work on the machine disturbs them less.

    python examples/benchmarks/scaling.py --output scaling
    python examples/benchmarks/scaling.py --output scaling-block --model block
    python examples/benchmarks/scaling.py --output scaling --redraw
    python examples/benchmarks/scaling.py --output scaling --sweeps width --widths 192 768
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator
from tqdm import tqdm

from layers import METHODS, Point, blocks, linear_layers
from loca_vision.messages import aligned
from loca_vision.recipes.reports.plots import COLOURS, save
from rounds import check_positive, in_turns, ratio, report, run, write
from table_rows import shown

SCRIPT = "scaling.py"
STYLES = dict(zip(METHODS, ("0--", "1-", "1:", "3-", "2-"), strict=True))  # number of the colour, and dash
FREE = 1.05  # times the lower bound, or LoRA
Sweep = Literal["components", "width", "tokens"]


@dataclass(frozen=True)
class Settings:
    """Time one adapted layer along three axes, and draw the curves."""

    model: Literal["linear", "block"] = "linear"
    """A square linear layer, or a ViT block with adapted query and value (for peft's FourierFT, the whole qkv)."""
    output: Path = Path("scaling")
    """Folder for `scaling.json` and a picture of each sweep."""
    sweeps: tuple[Sweep, ...] = ("components", "width", "tokens")
    """Axes to sweep."""
    components: tuple[int, ...] = (100, 300, 1000, 3000, 10000, 30000, 100000)
    """Components B, and n of FourierFT, in the sweep of components."""
    widths: tuple[int, ...] = (192, 384, 768, 1280, 2048, 4096)
    """Inputs and outputs of the layer in the sweep of widths."""
    tokens: tuple[int, ...] = (64, 256, 1024, 4096, 16384)
    """Vectors that the layer sees in the sweep of tokens."""
    usual: tuple[int, int, int] = (3000, 768, 1576)
    """Components, width and tokens when they are not swept."""
    rank: int = 16
    """Rank r of LoRA."""
    rounds: int = 7
    """Turns of each method, after a warm-up turn."""
    threads: int = 1
    """Torch threads."""
    seed: int = 0
    """Seed of the weights, activations and cells."""
    redraw: bool = False
    """Redraw the pictures from the existing `scaling.json` and time nothing."""

    def __post_init__(self) -> None:
        check_positive(self, "components", "widths", "tokens", "usual", "rank", "rounds", "threads")


def points(settings: Settings, sweep: Sweep) -> Iterator[Point]:
    """Yield the points of a sweep whose components fit into the layer."""
    components, width, tokens = settings.usual
    swept = {
        "components": [Point(value, width, tokens) for value in settings.components],
        "width": [Point(components, value, tokens) for value in settings.widths],
        "tokens": [Point(components, width, value) for value in settings.tokens],
    }
    yield from (point for point in swept[sweep] if point.components <= point.width**2)


def seconds_at(point: Point, settings: Settings) -> dict[str, list[float]]:
    torch.manual_seed(settings.seed)
    made = blocks(point, settings.rank) if settings.model == "block" else linear_layers(point, settings.rank, settings.seed)
    return in_turns(made, settings.rounds, bar=False)


def within(values: Sequence[int], ratios: Sequence[float], limit: float = FREE) -> str:
    """Describe in words at which of the ascending values a ratio is within the limit.

    The words "up to" and "from" are used only if the ratio crosses the limit once.
    """
    good = [ratio <= limit for ratio in ratios]
    if all(good) or not any(good):
        return "everywhere" if all(good) else "nowhere"
    changes = [place for place in range(1, len(good)) if good[place] != good[place - 1]]
    if len(changes) > 1:
        return "at " + ", ".join(f"{value}" for value, free in zip(values, good, strict=True) if free)
    return f"up to {values[changes[0] - 1]}" if good[0] else f"from {values[changes[0]]} on"


def free(sweep: Sweep, found: Mapping[Point, Mapping[str, list[float]]]) -> dict[str, dict[str, Any]]:
    """Return, for each method but the floor, its ratios to the floor, where it is free, and where it is as cheap as LoRA."""
    values, result = [getattr(point, sweep) for point in found], {}
    for method in METHODS[1:]:
        ratios = {against: [ratio(own[method], own[against]) for own in found.values()] for against in ("floor", "LoRA")}
        where = {against: within(values, some) for against, some in ratios.items()}
        result[method] = {"ratios": ratios["floor"], **where}
    return result


def draw(path: Path, sweep: Sweep, found: Mapping[Point, Mapping[str, list[float]]], title: str) -> None:
    """Plot milliseconds, and their ratio to the lower bound."""
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    times, ratios = figure.subplots(1, 2)
    places = [getattr(point, sweep) for point in found]
    for method, style in STYLES.items():
        values = [1e3 * median(own[method]) for own in found.values()]
        against = [ratio(own[method], own["floor"]) for own in found.values()]
        name = "frozen, the lower bound" if method == "floor" else method
        for axes, heights in ((times, values), (ratios, against)):
            colour, dash = COLOURS[int(style[0])], style[1:]
            axes.plot(places, heights, color=colour, linestyle=dash, marker="o", markersize=3, label=name)
    ratios.axhspan(1, FREE, color="#f2d7a0", alpha=0.6, linewidth=0, label=f"free: at most {FREE:g}")
    times.set(xscale="log", yscale="log", xlabel=sweep, ylabel="ms a step", title=title)
    ratios.set(xscale="log", yscale="log", xlabel=sweep, ylabel="times the lower bound")
    for axes in (times, ratios):
        _plain_ticks(axes, places)
    figure.legend(*ratios.get_legend_handles_labels(), loc="outside lower center", ncols=len(METHODS) + 1, fontsize=8)
    save(figure, path)


def _plain_ticks(axes: Any, places: Sequence[int]) -> None:
    """Label the x axis with the swept values, and the y axis without powers of ten."""
    axes.set_xticks(places, [f"{value:,}" for value in places], fontsize=8)
    axes.xaxis.set_minor_locator(NullLocator())
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5)) if high > 5 * low else MaxNLocator(6))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def benchmark(settings: Settings) -> None:
    file = settings.output / "scaling.json"
    if settings.redraw:
        draw_all(settings.output, json.loads(file.read_text()))
        return
    torch.set_num_threads(settings.threads)
    swept: dict[str, list[dict[str, Any]]] = {}
    cheap: dict[str, dict[str, Any]] = {}
    for sweep in settings.sweeps:
        places = tqdm(list(points(settings, sweep)), desc=sweep, disable=None)
        found = {point: seconds_at(point, settings) for point in places}
        swept[sweep] = [asdict(point) | {"seconds": seconds} for point, seconds in found.items()]
        cheap[sweep] = free(sweep, found)
        result = report(SCRIPT, settings, limit=FREE, free=cheap, sweeps=swept)
        write(file, result)
        print(table(sweep, found))
    draw_all(settings.output, result)
    print(shown(result))


def draw_all(folder: Path, result: Mapping[str, Any]) -> None:
    """Draw a picture of each sweep from the contents of `scaling.json`."""
    for sweep, rows in result["sweeps"].items():
        found = {Point(row["components"], row["width"], row["tokens"]): row["seconds"] for row in rows}
        draw(folder / f"{sweep}.png", sweep, found, _title(result["settings"], sweep))


def _title(settings: Mapping[str, Any], sweep: Sweep) -> str:
    components, width, tokens = settings["usual"]
    fixed = {"components": f"{components} components", "width": f"width {width}", "tokens": f"{tokens} tokens"}
    threads = "1 thread" if settings["threads"] == 1 else f"{settings['threads']} threads"
    what = "a block of a ViT" if settings["model"] == "block" else "one linear layer"
    return ", ".join([what, *(text for name, text in fixed.items() if name != sweep), threads])


def table(sweep: Sweep, found: Mapping[Point, Mapping[str, list[float]]]) -> str:
    """Return a table of ratios to the floor."""
    rows = [[sweep, *METHODS]]
    for point, own in found.items():
        rows.append([f"{getattr(point, sweep)}", *(f"{ratio(own[method], own['floor']):.2f}" for method in METHODS)])
    return aligned(rows, str.rjust)


def main(arguments: Sequence[str] | None = None) -> int:
    return run(SCRIPT, Settings, benchmark, arguments)


if __name__ == "__main__":
    sys.exit(main())
