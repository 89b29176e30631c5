"""How the cost of one training step grows with components, width and tokens: LoCA, LoRA, peft's FourierFT, and the lower bound.

The model is one square linear layer by itself, forward and backward with a gradient at its input, so that an adapter's cost is
not hidden behind the rest of a network: a block of a ViT does six times the work of its query and value. The lower bound is
the frozen layer. Every method takes a turn in every round; with one thread the seconds are the processor's own, so that other
work on the machine disturbs them less.

    python examples/benchmarks/scaling.py --output scaling
    python examples/benchmarks/scaling.py --output scaling --sweeps width --widths 192 768
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Literal

import peft
import torch
import tyro
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

from loca_vision import LoRAConfig
from loca_vision.atomic import write_atomically
from loca_vision.layer import adapt
from loca_vision.plots import COLOURS, save
from loca_vision.spectrum import random_spectrum
from loca_vision.update import Update
from loca_vision.updates import Place

STYLES = {
    "floor": (COLOURS[0], "--"),
    "LoCA, coefficients": (COLOURS[1], "-"),
    "LoCA, locations": (COLOURS[1], ":"),
    "LoRA": (COLOURS[3], "-"),
    "FourierFT, peft": (COLOURS[2], "-"),
}
METHODS = tuple(STYLES)
Sweep = Literal["components", "width", "tokens"]


@dataclass(frozen=True)
class Settings:
    """Time one adapted layer along three axes, and draw the curves."""

    output: Path = Path("scaling")
    """Folder for `scaling.json` and a picture of each sweep."""
    sweeps: tuple[Sweep, ...] = ("components", "width", "tokens")
    """Which axes."""
    components: tuple[int, ...] = (100, 300, 1000, 3000, 10000, 30000, 100000)
    """B, and n of FourierFT, of the first sweep."""
    widths: tuple[int, ...] = (192, 384, 768, 1280, 2048, 4096)
    """Inputs and outputs of the layer, of the second."""
    tokens: tuple[int, ...] = (64, 256, 1024, 4096, 16384)
    """Vectors that the layer sees, of the third."""
    usual: tuple[int, int, int] = (3000, 768, 1576)
    """Components, width and tokens where they are not what is swept."""
    rank: int = 16
    """r of LoRA."""
    rounds: int = 7
    """Turns of each method, after one that does not count."""
    threads: int = 1
    """Of torch."""
    seed: int = 0
    """Of weights, activations and cells."""

    def __post_init__(self) -> None:
        for field in ("components", "widths", "tokens", "usual"):
            if min(getattr(self, field), default=0) < 1:
                raise ValueError(f"{field}={getattr(self, field)}: whole numbers from 1 up")
        for field in ("rank", "rounds", "threads"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}={getattr(self, field)}: a whole number from 1 up")


@dataclass(frozen=True)
class Point:
    """One layer."""

    components: int
    width: int
    tokens: int


def points(settings: Settings, sweep: Sweep) -> Iterator[Point]:
    """Those whose components the layer has room for."""
    components, width, tokens = settings.usual
    swept = {
        "components": [Point(value, width, tokens) for value in settings.components],
        "width": [Point(components, value, tokens) for value in settings.widths],
        "tokens": [Point(components, width, value) for value in settings.tokens],
    }
    yield from (point for point in swept[sweep] if point.components <= point.width**2)


def layer_of(method: str, point: Point, settings: Settings) -> nn.Module:
    torch.manual_seed(settings.seed)
    layer: nn.Module = nn.Linear(point.width, point.width).requires_grad_(False)
    if method == "FourierFT, peft":
        config = peft.FourierFTConfig(n_frequency=point.components, scaling=300.0, init_weights=True, target_modules=["0"])
        adapted: nn.Module = peft.get_peft_model(nn.Sequential(layer), config)
        return adapted
    if method != "floor":
        updates = adapt(layer)
        updates.add(Place("default", "layer", None), update_of(method, point, settings))
        updates.strengths["default"] = 1.0
    return layer


def update_of(method: str, point: Point, settings: Settings) -> Update:
    shape = (point.width, point.width)
    if method == "LoRA":
        update = LoRAConfig(r=min(settings.rank, point.width)).made(shape)
        nn.init.normal_(update.down)
        return update
    spectrum = random_spectrum(shape, point.components, name="layer", seed=settings.seed)
    nn.init.normal_(spectrum.coefficients, std=1e-3)
    spectrum.coefficients.requires_grad_(method == "LoCA, coefficients")
    spectrum.locations.requires_grad_(method == "LoCA, locations")
    return spectrum


def step(layer: nn.Module, x: Tensor, direction: Tensor) -> None:
    layer.zero_grad()
    x.grad = None
    layer(x).backward(direction)


def seconds_of(point: Point, settings: Settings) -> dict[str, list[float]]:
    clock = time.process_time if settings.threads == 1 else time.perf_counter
    layers = {method: layer_of(method, point, settings) for method in METHODS}
    x, direction = torch.randn(point.tokens, point.width, requires_grad=True), torch.randn(point.tokens, point.width)
    seconds: dict[str, list[float]] = {method: [] for method in METHODS}
    for counted in [False] + [True] * settings.rounds:
        for method, layer in layers.items():
            started = clock()
            step(layer, x, direction)
            seconds[method] += [clock() - started] * counted
    return seconds


def draw(path: Path, sweep: Sweep, found: Mapping[Point, Mapping[str, list[float]]], title: str) -> None:
    """Milliseconds, and how many times the lower bound they are."""
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    times, ratios = figure.subplots(1, 2)
    places = [getattr(point, sweep) for point in found]
    for method, (colour, dash) in STYLES.items():
        values = [1e3 * median(seconds[method]) for seconds in found.values()]
        against = [median(a / b for a, b in zip(own[method], own["floor"], strict=True)) for own in found.values()]
        name = "frozen layer" if method == "floor" else method
        for axes, heights in ((times, values), (ratios, against)):
            axes.plot(places, heights, color=colour, linestyle=dash, marker="o", markersize=3, label=name)
    times.set(xscale="log", yscale="log", xlabel=sweep, ylabel="ms a step", title=title)
    ratios.set(xscale="log", yscale="log", xlabel=sweep, ylabel="times the frozen layer")
    ratios.legend()
    save(figure, path)


def main() -> int:
    try:
        settings = tyro.cli(partial(Settings), description=Settings.__doc__, use_underscores=True)
        settings.output.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    torch.set_num_threads(settings.threads)
    results: dict[str, list[dict[str, object]]] = {}
    for sweep in settings.sweeps:
        found = {point: seconds_of(point, settings) for point in tqdm(list(points(settings, sweep)), desc=sweep, disable=None)}
        results[sweep] = [asdict(point) | {"seconds": seconds} for point, seconds in found.items()]
        draw(settings.output / f"{sweep}.png", sweep, found, _title(settings, sweep))
        report = {"torch": torch.__version__, "peft": peft.__version__, "sweeps": results}
        fields = asdict(settings) | {"output": str(settings.output)}
        write_atomically(settings.output / "scaling.json", json.dumps({"settings": fields, **report}, indent=1).encode())
        print(table(sweep, found))
    return 0


def _title(settings: Settings, sweep: Sweep) -> str:
    components, width, tokens = settings.usual
    fixed = {"components": f"{components} components", "width": f"width {width}", "tokens": f"{tokens} tokens"}
    threads = "1 thread" if settings.threads == 1 else f"{settings.threads} threads"
    return ", ".join([*(text for name, text in fixed.items() if name != sweep), threads])


def table(sweep: Sweep, found: Mapping[Point, Mapping[str, list[float]]]) -> str:
    lines = [f"{sweep:>12}" + "".join(f"{method:>20}" for method in METHODS)]
    for point, seconds in found.items():
        ratios = [median(a / b for a, b in zip(seconds[method], seconds["floor"], strict=True)) for method in METHODS]
        lines.append(f"{getattr(point, sweep):12}" + "".join(f"{ratio:20.2f}" for ratio in ratios))
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
