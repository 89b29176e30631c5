"""How much does it cost to build an update and to compute its gradient? The implementations of LoCA's Appendix J and Table 10.

Delta W = C^T S D of a K x K weight with B components, and the coefficients' gradient dL/da from G = dL/d(Delta W), are computed
in four ways:

- atoms: the sum of B products of a column and a row, as one product of (K, B) and (B, K);
- matrices: two products with cosine matrices (Eq. 1);
- fast: cosine transforms by FFTs;
- library: what loca_vision does on this device: on a CPU, fast transforms of only the rows that contain components.

FourierFT (Re(ifft2(F)) by one complex FFT) and LoRA (B A) are measured for comparison. Only the update is timed: in training,
the frozen layer and the rest of the model cost more; examples/benchmarks measures whole steps, with memory. Seconds are CPU
time of one thread; methods take turns, and medians are reported. It takes a minute.

    python examples/paper/implementations.py --output implementations
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from common import measure_parts, plain, run
from loca_vision.checks import check_count, check_seed
from loca_vision.functional.cosine_atoms import AtomSettings, Cells, coefficient_gradient, offsets
from loca_vision.functional.cosine_sum import cosine_matrix, spectrum_at
from loca_vision.functional.dct import Method, dct2, dct_matrix, idct2
from loca_vision.messages import aligned
from loca_vision.methods.spectrum import random_spectrum
from loca_vision.recipes.reports.plots import save

SCRIPT = "implementations.py"
COLOURS = {
    "atoms": "#d1603d", "matrices": "#d9a420", "fast": "#3a923a", "library": "#0b6e99",
    "FourierFT": "#7b3294", "LoRA": "#8c8c8c",
}  # fmt: skip
Steps = tuple[Callable[[], Tensor], Callable[[], Tensor]]


@dataclass(frozen=True)
class Settings:
    """Time four implementations, FourierFT and LoRA: building an update, and computing its coefficients' gradient."""

    sizes: tuple[int, ...] = (768, 1536)
    """Sizes K: rows and columns of the weight."""
    components: tuple[int, ...] = (300, 1000, 3000, 10000)
    """Numbers of components B."""
    rank: int = 16
    """Rank of LoRA."""
    rounds: int = 15
    """Measured turns of every implementation."""
    seed: int = 0
    """Seed of the cells, coefficients and gradients."""
    output: Path = Path("implementations")
    """Folder for implementations.json and implementations.png."""

    def __post_init__(self) -> None:
        for size in self.sizes:
            check_count("sizes", size, 2)
        for count in self.components:
            check_count("components", count, 1, min(self.sizes) ** 2)
        check_count("rank", self.rank, 1, min(self.sizes))
        check_count("rounds", self.rounds)
        check_seed(self.seed)


def by_atoms(coefficients: Tensor, cells: Tensor, gradient: Tensor) -> Steps:
    cosines = dct_matrix(len(gradient))
    rows, cols = cells.T

    def derivatives() -> Tensor:
        return ((cosines[rows] @ gradient) * cosines[cols]).sum(1)

    return lambda: (cosines[rows].T * coefficients) @ cosines[cols], derivatives


def by_transforms(method: Method, coefficients: Tensor, cells: Tensor, gradient: Tensor) -> Steps:
    places = tuple(cells.T)

    def update() -> Tensor:
        return idct2(torch.zeros_like(gradient).index_put_(places, coefficients), method=method)

    return update, lambda: dct2(gradient, method=method)[places]


def by_library(coefficients: Tensor, cells: Tensor, gradient: Tensor) -> Steps:
    settings = AtomSettings((len(gradient), len(gradient)), 1.0, "central")
    layout = Cells(cells, settings.shape)  # kept from step to step while locations do not move

    def derivatives() -> Tensor:
        found = coefficient_gradient(spectrum_at(gradient, layout, offsets("central", True, False)), settings)
        assert found is not None
        return found

    return lambda: cosine_matrix(coefficients, layout, 1.0), derivatives


def by_fourier(coefficients: Tensor, cells: Tensor, gradient: Tensor) -> Steps:
    """Return both steps of FourierFT. They are the same transform, as its cosines are symmetric in cell and position."""
    places = tuple(cells.T)

    def update() -> Tensor:
        spectrum = torch.zeros_like(gradient, dtype=torch.complex64).index_put_(places, coefficients.to(torch.complex64))
        built: Tensor = torch.fft.ifft2(spectrum).real
        return built

    return update, lambda: torch.fft.ifft2(gradient.to(torch.complex64)).real[places]


def by_rank(rank: int, gradient: Tensor, generator: torch.Generator) -> Steps:
    up, down = torch.randn((2, len(gradient), rank), generator=generator)
    return lambda: up @ down.T, lambda: torch.cat([gradient @ down, gradient.T @ up])


def implementations(size: int, count: int, settings: Settings) -> dict[str, Steps]:
    """Return both steps by name: building the update (K, K), and computing the gradient (B,) in the order of the cells."""
    generator = torch.Generator().manual_seed(settings.seed)
    cells = random_spectrum((size, size), count, name="layer", seed=settings.seed).cells
    coefficients = torch.randn(count, generator=generator)
    gradient = torch.randn((size, size), generator=generator)
    return {
        "atoms": by_atoms(coefficients, cells, gradient),
        "matrices": by_transforms("matrix", coefficients, cells, gradient),
        "fast": by_transforms("fast", coefficients, cells, gradient),
        "library": by_library(coefficients, cells, gradient),
        "FourierFT": by_fourier(coefficients, cells, gradient),
        "LoRA": by_rank(settings.rank, gradient, generator),
    }


def measure(part: str, settings: Settings) -> dict[str, Any]:
    """Return milliseconds of both steps by implementation: medians over all rounds after a warm-up round."""
    size, count = map(int, part.split(" x "))
    steps = implementations(size, count, settings)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for _ in tqdm(range(settings.rounds + 1), desc=part, leave=False, disable=None):
        for name, (update, derivatives) in steps.items():
            seconds[name].append((_seconds(update), _seconds(derivatives)))
    columns = {name: list(zip(*found[1:], strict=True)) for name, found in seconds.items()}
    return {
        name: {"update_ms": _milliseconds(update), "gradient_ms": _milliseconds(derivatives)}
        for name, (update, derivatives) in columns.items()
    }


def _seconds(work: Callable[[], object]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def _milliseconds(seconds: Sequence[float]) -> float:
    return float(f"{1000 * median(seconds):.3g}")


def both(own: dict[str, float]) -> float:
    """Return the total milliseconds of building and of the gradient."""
    return own["update_ms"] + own["gradient_ms"]


def draw(report: dict[str, Any], path: Path) -> None:
    """Plot milliseconds of both steps by number of components, with a panel for each size."""
    sizes = report["settings"]["sizes"]
    figure = Figure(figsize=(5 * len(sizes) + 1.5, 4.2), layout="constrained")
    for axes, size in zip(figure.subplots(1, len(sizes), squeeze=False).flat, sizes, strict=True):
        for name, colour in COLOURS.items():
            places = report["settings"]["components"]
            values = [both(report["parts"][f"{size} x {count}"][name]) for count in places]
            axes.plot(places, values, "o-", color=colour, label=name, markersize=4)
        title = f"{size} x {size}, one thread"
        plain(axes).set(xscale="log", yscale="log", xlabel="B", ylabel="update and gradient, ms", title=title)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center", frameon=False)
    save(figure, path)


def table(report: dict[str, Any]) -> str:
    rows = [["K x B", *COLOURS]]
    rows += [[part, *(f"{both(found[name]):.2f}" for name in COLOURS)] for part, found in report["parts"].items()]
    return aligned(rows, str.rjust)


def reproduce(settings: Settings) -> None:
    file = settings.output / "implementations.json"
    torch.set_num_threads(1)
    parts = [f"{size} x {count}" for size in settings.sizes for count in settings.components]
    report = measure_parts(file, settings, parts, lambda part: measure(part, settings))
    draw(report, settings.output / "implementations.png")
    print(table(report))
    print("Milliseconds of building an update and computing its gradient, by size and components.")


def main(arguments: Sequence[str] | None = None) -> int:
    return run(SCRIPT, Settings, reproduce, arguments)


if __name__ == "__main__":
    sys.exit(main())
