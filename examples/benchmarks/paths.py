"""Time three ways to train a cosine update over a grid of sizes: does the cost model pick the fastest one?

This is what each way adds to a frozen layer, forward and backward. The first builds W + Delta W, transforms the whole gradient
dY^T X, and reads it at the cells. The second also builds W + Delta W, but samples the gradient with transforms of activations
and output gradients. The third builds nothing and multiplies the transformed activations. The ways take turns, and the minimum
seconds of each count. Each line shows the pick and how much slower it is than the best. At the end follow the worst picks, and
the `Costs` that fit this machine, to be put into `loca_vision.paths.COSTS`. With more threads, these are what
`Costs.of_threads` should return.

With one thread, seconds are CPU time, so that other work on the machine disturbs them less.

    python examples/benchmarks/paths.py --output paths.json
    python examples/benchmarks/paths.py --sizes 768x768 1280x320 --tokens 256 --components 1000
    python examples/benchmarks/paths.py --device cuda --tokens 6304 25216 --components 1000 3000
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal

import torch
from scipy.optimize import nnls
from torch import Tensor
from tqdm import tqdm

from loca_vision.functional.batch_tables import BatchCells
from loca_vision.functional.cosine_atoms import Cells, offsets
from loca_vision.functional.cosine_batch import CosineBatch
from loca_vision.functional.cosine_sum import cosine_matrix, spectrum_at
from loca_vision.functional.cost_model import COSTS, Costs, Strategy, Workload, choose, seconds_of
from loca_vision.functional.packed_dct import add_samples
from loca_vision.functional.row_linear import add_rows
from loca_vision.functional.sparse_products import spectrum_of, transposed_of
from loca_vision.functional.token_spectra import add_applied, in_pieces, spectra_at, split_like
from loca_vision.messages import one_line
from rounds import check_positive, in_turns, report, run, write

SCRIPT = "paths.py"
WAYS: tuple[Strategy, ...] = ("whole", "sampled", "applied")
TOGETHER: Strategy = "together"
PEERS = 12  # weights of one shape processed at once on a GPU; their seconds are divided among them
NOTHING = Costs(product=0, half_product=0, transform=0, spread=0, dot=0, cell=0, piece=0, add=0)
PHASES = {"coefficients": (True, False), "locations": (False, True)}


@dataclass(frozen=True)
class Settings:
    """Time the ways of training a cosine update, and the choice between them."""

    sizes: tuple[str, ...] = ("320x320", "768x768", "1280x1280", "320x768", "3072x768", "768x3072", "4096x1024")
    """Outputs x inputs of the weight."""
    tokens: tuple[int, ...] = (32, 128, 512, 1576, 6304)
    """Numbers of activation vectors, batch and positions together."""
    components: tuple[int, ...] = (300, 1000, 3000, 30000)
    """Numbers of components B; those above a quarter of a weight's cells are left out."""
    projections: tuple[int, ...] = (1, 2)
    """Numbers of projections that are adapted at once and share the same activations."""
    repeats: int = 5
    """Turns of each way, after a warm-up turn."""
    threads: int = 1
    """Torch threads."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where the ways are timed. A way that fails on a GPU is reported, and the others are fitted."""
    seed: int = 0
    """Seed of the cells and the values."""
    output: Path | None = None
    """JSON file for settings, seconds, picks and fitted costs."""

    def __post_init__(self) -> None:
        check_positive(self, "tokens", "components", "projections", "repeats", "threads")
        for size in self.sizes:
            _shape(size)
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device='cuda': expected a GPU that torch can use, got none")


@dataclass(frozen=True)
class Case:
    """One point of the grid."""

    shape: tuple[int, int]
    tokens: int
    components: int
    projections: int
    phase: str

    @property
    def asked(self) -> list[Workload]:
        return [Workload(self.shape, self.components, len(offsets("central", *PHASES[self.phase])))] * self.projections


@dataclass(frozen=True)
class Timed:
    """Seconds of each way for one case, and what the model picked."""

    case: Case
    seconds: dict[Strategy, float]
    picked: Strategy
    failed: dict[Strategy, str] = field(default_factory=dict)

    @property
    def loss(self) -> float:
        """Seconds of the pick over those of the best; infinite if the pick failed."""
        return self.seconds.get(self.picked, math.inf) / min(self.seconds.values(), default=1.0)


def _shape(size: str) -> tuple[int, int]:
    rows, _, cols = size.partition("x")
    if not (rows.isdecimal() and cols.isdecimal() and int(rows) and int(cols)):
        raise ValueError(f"sizes: {size!r} is not a pair of whole numbers from 1 up such as 768x768")
    return int(rows), int(cols)


def cases(settings: Settings) -> Iterator[Case]:
    grid = product(map(_shape, settings.sizes), settings.tokens, settings.components, settings.projections, PHASES)
    for case in (Case(*point) for point in grid):
        if case.components <= math.prod(case.shape) // 4:
            yield case


def ways(case: Case, device: torch.device) -> dict[Strategy, Callable[[], object]]:
    """Return the computation of each way for a case, on tensors of the device."""
    with device:
        return _ways(case)


def _ways(case: Case) -> dict[Strategy, Callable[[], object]]:
    work = _Prepared(case)
    found: dict[Strategy, Callable[[], object]] = {"whole": work.whole, "sampled": work.sampled, "applied": work.applied}
    return found if work.x.device.type == "cpu" else found | {TOGETHER: work.together}


class _Prepared:
    """The tensors of a case, and the computation of each way."""

    def __init__(self, case: Case) -> None:
        (rows, cols), count = case.shape, case.projections
        self.case, self.moving = case, case.phase == "locations"
        self.x, self.grads = torch.randn(case.tokens, cols), list(torch.randn(case.tokens, count, rows).unbind(1))
        self.weights, self.coefficients = list(torch.randn(count, rows, cols).unbind(0)), torch.randn(case.components)
        self.known = [Cells(_cells(case), case.shape) for _ in self.grads]
        self.offsets = offsets("central", *PHASES[case.phase])

    def layouts(self) -> list[Cells]:
        """Return the layouts; in a phase of locations, new ones with nothing cached, as after a step."""
        return [Cells(one.cells, one.shape) for one in self.known] if self.moving else self.known

    def built(self, layouts: list[Cells]) -> None:
        for weight, layout in zip(self.weights, layouts, strict=True):
            add_rows(weight, [(None, cosine_matrix(self.coefficients, layout, 1.0))])

    def whole(self) -> None:
        layouts = self.layouts()
        self.built(layouts)
        for grad, layout in zip(self.grads, layouts, strict=True):
            spectrum_at(grad.T @ self.x, layout, self.offsets)

    def sampled(self) -> None:
        layouts = self.layouts()
        self.built(layouts)
        count = len(layouts)
        spectra_at(in_pieces(self.x), self.grads, layouts, [self.offsets] * count, [None] * count)

    def applied(self) -> None:
        layouts, pieces = self.layouts(), in_pieces(self.x)
        outputs = self.x.new_zeros(self.case.tokens, self.case.shape[0])
        for layout in layouts:
            add_applied(outputs, spectrum_of(layout, self.coefficients), pieces)
        backs = [transposed_of(layout, self.coefficients) for layout in layouts]
        onward = spectra_at(pieces, self.grads, layouts, [self.offsets] * len(layouts), backs)[1]
        for tokens, piece in zip(split_like(torch.zeros_like(self.x), pieces), onward, strict=True):
            add_samples(tokens, piece)

    def together(self) -> None:
        every = [grad for grad in self.grads for _ in range(PEERS)]
        cells = torch.cat([self.known[0].cells] * len(every))
        layout = BatchCells(cells, [self.case.components] * len(every), self.case.shape)
        batch = CosineBatch(self.coefficients.repeat(len(every)), layout, 1.0, "central")
        torch._foreach_add_(list(batch.matrices().unbind(0)), [self.weights[0]] * len(every))
        batch.gradients([grad.T @ self.x for grad in every], not self.moving, self.moving)


def _cells(case: Case) -> Tensor:
    return torch.stack([torch.randint(size, (case.components,)) for size in case.shape], 1)


def measure(settings: Settings) -> list[Timed]:
    torch.manual_seed(settings.seed)
    return [timed(case, settings) for case in tqdm(list(cases(settings)), unit="case", disable=None)]


@torch.no_grad()
def timed(case: Case, settings: Settings) -> Timed:
    device, failed = torch.device(settings.device), dict[Strategy, str]()
    picked = choose(case.asked, case.tokens, device, torch.float32)[0].strategy
    calls = ways(case, device)
    if settings.device != "cpu":  # where not all that a way calls may exist
        failed = _failing(calls)
    calls = {way: call for way, call in calls.items() if way not in failed}
    seconds = {way: min(own) for way, own in in_turns(calls, settings.repeats, bar=False).items()}
    if TOGETHER in seconds:
        seconds[TOGETHER] /= PEERS
    return Timed(case, seconds, picked, failed)


def _failing(calls: dict[Strategy, Callable[[], object]]) -> dict[Strategy, str]:
    """Return, for each way that fails, the reason."""
    found: dict[Strategy, str] = {}
    for way, call in calls.items():
        try:
            call()
        except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
            found[way] = one_line(f"{type(error).__name__}: {error}", 300)
    return found


def fitted(timed: list[Timed]) -> Costs:
    """Return the nonnegative costs with the least squared relative error. No case has products in half precision."""
    fields = [name for name in vars(COSTS["cpu"]) if name not in ("half_product", "serial")]
    if not any(TOGETHER in one.seconds for one in timed):
        fields.remove("launch")
    terms, seconds = [], []
    for one in timed:
        for way, taken in one.seconds.items():
            terms.append([modelled(one.case, way, replace(NOTHING, **{name: 1.0})) for name in fields])
            seconds.append(taken)
    found = dict(zip(fields, _solved(terms, seconds), strict=True))
    return replace(COSTS["cpu"], **found)


def of_device(costs: Costs, device: torch.device) -> Costs:
    """Complete fitted costs with this device's measured speed-up of products in half precision."""
    speedup = _product_seconds(torch.float32, device) / _product_seconds(torch.bfloat16, device)
    return replace(costs, half_product=float(f"{costs.product / speedup:.2g}"))


def _product_seconds(dtype: torch.dtype, device: torch.device, repeats: int = 5) -> float:
    shape = (32768, 2048) if device.type == "cuda" else (256, 768)
    grads, x = (torch.randn(shape, device=device, dtype=dtype) for _ in range(2))
    return min(in_turns({"product": lambda: grads.T @ x}, repeats, bar=False)["product"])


def modelled(case: Case, way: Strategy, costs: Costs) -> float:
    """Return the model's seconds, which are linear in its costs."""
    own, shared = seconds_of(case.asked, case.tokens, torch.float32, costs)
    return sum(own[way]) + {"whole": 0, "sampled": 1, "applied": 2, "together": 0}[way] * shared


def errors(timed: list[Timed], costs: Costs) -> list[float]:
    """Return the model's errors relative to the measured seconds of each way in each case."""
    pairs = ((modelled(one.case, way, costs), taken) for one in timed for way, taken in one.seconds.items())
    return [abs(said / taken - 1) for said, taken in pairs]


def _solved(terms: list[list[float]], seconds: list[float]) -> list[float]:
    relative = torch.tensor(terms, dtype=torch.float64) / torch.tensor(seconds, dtype=torch.float64)[:, None]
    scale = relative.norm(dim=0).clamp(min=1e-300)  # of a cost that no case has
    found, _ = nnls((relative / scale).numpy(), torch.ones(len(seconds), dtype=torch.float64).numpy())
    return [float(f"{value:.2g}") for value in (torch.from_numpy(found) / scale).tolist()]


def shown(settings: Settings) -> list[Strategy]:
    """Return the ways that are timed on this device, one for each column."""
    return [*WAYS] if settings.device == "cpu" else [*WAYS, TOGETHER]


def line(one: Timed, columns: list[Strategy]) -> str:
    (rows, cols), case = one.case.shape, one.case
    name = f"{rows} x {cols}, {case.tokens} tokens, B {case.components}, {case.projections} at once, {case.phase}"
    seconds = "".join(f"{1e3 * one.seconds[way]:10.2f}" if way in one.seconds else f"{'failed':>10}" for way in columns)
    return f"{name:62}{seconds}  {one.picked:8}{one.loss:6.2f}"


def as_json(one: Timed) -> dict[str, Any]:
    found = asdict(one) | {"loss": one.loss if one.picked in one.seconds else None}
    return found if one.failed else {name: value for name, value in found.items() if name != "failed"}


def to_paste(costs: Costs, device: str) -> str:
    """Return the line to paste into `loca_vision.functional.cost_model`."""
    return f'COSTS["{device}"] = {costs}'


def benchmark(settings: Settings) -> None:
    torch.set_num_threads(settings.threads)
    timed = measure(settings)
    costs = fitted(timed)
    if settings.device != "cpu":
        costs = of_device(costs, torch.device(settings.device))
    results = [as_json(one) for one in timed]
    write(settings.output, report(SCRIPT, settings, costs=asdict(costs), cases=results))
    columns = shown(settings)
    print(f"{'milliseconds':62}" + "".join(f"{way:>10}" for way in columns) + f"  {'picked':8}{'loss':>6}")
    print("\n".join(line(one, columns) for one in timed))
    slow = [one for one in timed if one.loss > 1.1]
    print(f"\n{len(timed)} cases, {len(slow)} of them picked more than 10 % slower than the best; the worst:")
    print("\n".join(line(one, columns) for one in sorted(timed, key=lambda one: -one.loss)[:5]))
    for way, why in {way: why for one in timed for way, why in one.failed.items()}.items():
        print(f"\n{way} failed: {why}")
    print(f"\nCosts that fit here:\n{costs if settings.device == 'cpu' else to_paste(costs, settings.device)}")


def main(arguments: Sequence[str] | None = None) -> int:
    return run(SCRIPT, Settings, benchmark, arguments)


if __name__ == "__main__":
    sys.exit(main())
