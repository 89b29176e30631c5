"""Both ways to the gradient of a cosine update, over a grid of sizes: is what the model of costs picks the faster one?

For every size the whole gradient, dY^T X transformed and read at the cells, and the sampled one, by transforms of activations
and output gradients, take turns; the least seconds of each count. A line says what was picked and how much slower that is than
the best. At the end: the worst picks, and the `Costs` that fit this machine, to be put into `loca_vision.paths.COSTS`.

With one thread the seconds are the processor's own, so that other work on the machine disturbs them less.

    python examples/benchmarks/paths.py --output paths.json
    python examples/benchmarks/paths.py --sizes 768x768 1280x320 --tokens 256 --components 1000
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import torch
from scipy.optimize import nnls
from torch import Tensor
from tqdm import tqdm

from loca_vision.cosine_sum import spectrum_at
from loca_vision.cosines import Layout, offsets
from loca_vision.paths import Asked, Costs, choose, tokens_at_once
from loca_vision.token_spectrum import spectra_at
from rounds import check_positive, in_turns, report, run, write

SCRIPT = "paths.py"
PHASES = {"coefficients": (True, False), "locations": (False, True)}


@dataclass(frozen=True)
class Settings:
    """Time both ways to a gradient, and the choice between them."""

    sizes: tuple[str, ...] = ("320x320", "768x768", "1280x1280", "320x768", "3072x768", "768x3072", "4096x1024")
    """Outputs x inputs of the weight."""
    tokens: tuple[int, ...] = (77, 256, 1576, 6304)
    """Vectors of the activations, batch and positions together."""
    components: tuple[int, ...] = (300, 3000, 30000)
    """B; those above a quarter of a weight's cells are left out."""
    projections: tuple[int, ...] = (1, 2)
    """Adapted at once by one product, which share its activations."""
    repeats: int = 5
    """Turns of each way, after one that does not count."""
    threads: int = 1
    """Of torch."""
    seed: int = 0
    """Of the cells and the numbers."""
    output: Path | None = None
    """JSON file for settings, seconds, picks and fitted costs."""

    def __post_init__(self) -> None:
        check_positive(self, "tokens", "components", "projections", "repeats", "threads")
        for size in self.sizes:
            _shape(size)


@dataclass(frozen=True)
class Case:
    """One point of the grid."""

    shape: tuple[int, int]
    tokens: int
    components: int
    projections: int
    phase: str

    @property
    def asked(self) -> list[Asked]:
        return [Asked(self.shape, self.components, len(offsets("central", *PHASES[self.phase])))] * self.projections


@dataclass(frozen=True)
class Timed:
    """Seconds of both ways for one case, and what the model picked."""

    case: Case
    whole: float
    sampled: float
    picked: str

    @property
    def loss(self) -> float:
        """Seconds of the pick over those of the best."""
        return (self.sampled if self.picked == "sampled" else self.whole) / min(self.whole, self.sampled)


def _shape(size: str) -> tuple[int, int]:
    rows, _, cols = size.partition("x")
    if not (rows.isdecimal() and cols.isdecimal() and int(rows) and int(cols)):
        raise ValueError(f"sizes: {size!r} is no pair of whole numbers from 1 up such as 768x768")
    return int(rows), int(cols)


def cases(settings: Settings) -> Iterator[Case]:
    grid = product(map(_shape, settings.sizes), settings.tokens, settings.components, settings.projections, PHASES)
    for case in (Case(*point) for point in grid):
        if case.components <= math.prod(case.shape) // 4:
            yield case


def ways(case: Case) -> dict[str, Callable[[], object]]:
    (rows, cols), places = case.shape, offsets("central", *PHASES[case.phase])
    x, grads = torch.randn(case.tokens, cols), torch.randn(case.tokens, case.projections, rows).unbind(1)
    cells = [_cells(case) for _ in grads]

    def whole() -> list[object]:
        layouts = (Layout(some, case.shape) for some in cells)  # nothing is known of them yet, as after a step of locations
        return [spectrum_at(grad.T @ x, layout, places) for grad, layout in zip(grads, layouts, strict=True)]

    def sampled() -> object:
        return spectra_at(x, list(grads), [Layout(some, case.shape) for some in cells], [places] * len(grads))

    return {"whole": whole, "sampled": sampled}


def _cells(case: Case) -> Tensor:
    return torch.stack([torch.randint(size, (case.components,)) for size in case.shape], 1)


def measure(settings: Settings) -> list[Timed]:
    torch.manual_seed(settings.seed)
    found = []
    for case in tqdm(list(cases(settings)), unit="case", disable=None):
        picked = choose(case.asked, case.tokens, torch.device("cpu"), torch.float32)[0].sampled
        seconds = {name: min(own) for name, own in in_turns(ways(case), settings.repeats, bar=False).items()}
        found.append(Timed(case, seconds["whole"], seconds["sampled"], "sampled" if picked else "whole"))
    return found


def fitted(timed: list[Timed]) -> Costs:
    """The costs with the least squared relative error, none below zero. Products of half precision are not among the cases."""
    numbers = [(one.case, one.case.asked[0]) for one in timed]
    whole = [
        [case.projections * math.prod(case.shape) * factor for factor in (case.tokens, math.log2(math.prod(case.shape)))]
        for case, _ in numbers
    ]
    sampled = []
    for case, asked in numbers:
        rows, cols = case.shape
        values = case.projections * asked.cells * asked.places
        transforms = [(rows, case.projections), (cols, 1)]
        by_token = sum(case.tokens * length * math.log2(2 * length) * count for length, count in transforms)
        pieces = sum(math.ceil(case.tokens / tokens_at_once(length)) * count / 2 for length, count in transforms)
        sampled.append([by_token, values * case.tokens, values, pieces])
    half = (2.9e-12,)
    first, second = _solved(whole, [one.whole for one in timed]), _solved(sampled, [one.sampled for one in timed])
    return Costs(first[0], *half, first[1], *second)


def _solved(terms: list[list[float]], seconds: list[float]) -> list[float]:
    relative = torch.tensor(terms, dtype=torch.float64) / torch.tensor(seconds, dtype=torch.float64)[:, None]
    scale = relative.norm(dim=0)
    found, _ = nnls((relative / scale).numpy(), torch.ones(len(seconds), dtype=torch.float64).numpy())
    return [float(f"{value:.2g}") for value in (torch.from_numpy(found) / scale).tolist()]


def line(one: Timed) -> str:
    (rows, cols), case = one.case.shape, one.case
    name = f"{rows} x {cols}, {case.tokens} tokens, B {case.components}, {case.projections} at once, {case.phase}"
    return f"{name:62}{1e3 * one.whole:10.2f}{1e3 * one.sampled:10.2f}  {one.picked:8}{one.loss:6.2f}"


def benchmark(settings: Settings) -> None:
    torch.set_num_threads(settings.threads)
    timed = measure(settings)
    costs = fitted(timed)
    results = [asdict(one) | {"loss": one.loss} for one in timed]
    write(settings.output, report(SCRIPT, settings, costs=asdict(costs), cases=results))
    print(f"{'':62}{'whole, ms':>10}{'sampled':>10}  {'picked':8}{'loss':>6}")
    print("\n".join(line(one) for one in timed))
    slow = [one for one in timed if one.loss > 1.1]
    print(f"\n{len(timed)} cases, {len(slow)} of them picked more than 10 % slower than the best; the worst:")
    print("\n".join(line(one) for one in sorted(timed, key=lambda one: -one.loss)[:5]))
    print(f"\nCosts that fit here:\n{costs}")


def main(arguments: Sequence[str] | None = None) -> int:
    return run(SCRIPT, Settings, benchmark, arguments)


if __name__ == "__main__":
    sys.exit(main())
