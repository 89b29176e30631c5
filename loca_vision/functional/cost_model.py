"""Predict, from sizes alone, the cheapest of four strategies to compute a cosine update and its gradient in training.

*Whole*: build W + Delta W and the gradient dY^T X, transform the gradient and read it at the cells. *Sampled*: build
W + Delta W; transform activations and output gradients token by token, so that a cell's gradient is a dot product over the
tokens. *Applied*: build no matrix; multiply the transformed activations by the sparse spectrum and transform back. All
projections of one product share the transform of the activations. *Together*: like whole, but for all updates of one shape at
once, by matrix products; this is for accelerators, which spend more time launching small operations than executing them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Literal

import torch

from loca_vision.functional.packed_dct import pieces

Strategy = Literal["whole", "sampled", "applied", "together"]


@dataclass(frozen=True)
class Costs:
    """Seconds that one thread of a device takes per unit of work.

    Attributes:
        product: one multiply-add of a float32 matrix product.
        half_product: the same in bfloat16 or float16.
        transform: one number of a cosine transform, per log2 of twice the transform's length.
        spread: one component times one vector, in a product with a sparse spectrum.
        dot: one multiply-add of a cell's dot product.
        cell: sorting one cell, while locations move.
        piece: the overhead of one piece of tokens, or of one sorting of cells.
        add: the overhead of one number of W + Delta W.
        launch: launching one operation, however small; 0 on the CPU, where updates are never built together.
        serial: the fraction of `transform` and `add` that more threads do not speed up.
    """

    product: float
    half_product: float
    transform: float
    spread: float
    dot: float
    cell: float
    piece: float
    add: float
    launch: float = 0.0
    serial: float = 0.35

    def of_threads(self, threads: int) -> Costs:
        """Return the costs with several threads; cells and pieces are bookkeeping, which a single thread does."""
        shared = self.serial + (1 - self.serial) / threads
        even = {name: getattr(self, name) / threads for name in ("product", "half_product", "spread", "dot")}
        return replace(self, **even, **{name: getattr(self, name) * shared for name in ("transform", "add")})


# By device type. `examples/benchmarks/paths.py` measures the costs and prints a line to insert here or to assign. Accelerators
# without an entry use "together", because they are best at large matrix products.
COSTS: dict[str, Costs] = {
    "cpu": Costs(
        product=1.3e-11,
        half_product=2.9e-12,
        transform=2.4e-10,
        spread=7.8e-11,
        dot=8.2e-11,
        cell=9.9e-8,
        piece=8.8e-5,
        add=7.2e-10,
    )
}


@dataclass(frozen=True)
class Workload:
    """The work that one update requires.

    Attributes:
        shape: (p, q) of the update.
        cells: B, the number of components.
        offsets: the number of values of the gradient's spectrum that each cell needs: 1 for coefficients, up to 5 while
            locations move.
    """

    shape: tuple[int, int]
    cells: int
    offsets: int


@dataclass(frozen=True)
class Decision:
    """The strategy chosen for one update.

    Attributes:
        strategy: how the update and its gradient are computed.
        seconds: the time of each strategy according to the model, including an equal share of the shared work; empty if the
            device's costs are unknown.
    """

    strategy: Strategy
    seconds: Mapping[Strategy, float] = field(default_factory=dict)


# One dot product of a gradient's spectrum costs about as much as this many numbers of the whole spectrum.
_SAMPLE_COST = 32


def reads_whole_spectrum(work: Workload) -> bool:
    """Whether a whole gradient is transformed along both axes, rather than along one with a dot product for each cell."""
    return work.cells * work.offsets * _SAMPLE_COST > math.prod(work.shape)


def choose(workloads: list[Workload], tokens: int, device: torch.device, dtype: torch.dtype) -> list[Decision]:
    """Return a strategy for each update of one product with activations (n, q), such that all together are cheapest."""
    if _forced is not None:
        return [Decision(_forced)] * len(workloads)
    if device.type not in COSTS or not workloads or not tokens:
        return [Decision("whole")] * len(workloads)
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    return list(_choose(tuple(workloads), tokens, dtype, COSTS[device.type], threads))


# The number of operations launched for one update, forward and backward, in addition to those of the frozen layer.
_LAUNCHES: dict[Strategy, int] = {"whole": 25, "sampled": 40, "applied": 40, "together": 4}


def builds_together(device: torch.device) -> bool:
    """Whether updates of one shape are built together on this device, whatever their sizes."""
    if _forced is not None:
        return _forced == "together"
    return device.type != "cpu" and device.type != "meta" and device.type not in COSTS


@contextmanager
def using(strategy: Strategy) -> Iterator[None]:
    """Compute all updates by this strategy inside the context, whatever it costs; for benchmarks and tests."""
    global _forced
    before, _forced = _forced, strategy
    try:
        yield
    finally:
        _forced = before


_forced: Strategy | None = None


@lru_cache(maxsize=1024)
def _choose(
    workloads: tuple[Workload, ...], tokens: int, dtype: torch.dtype, costs: Costs, threads: int
) -> tuple[Decision, ...]:
    own, shared = seconds_of(workloads, tokens, dtype, costs.of_threads(threads))
    gains = [max(slow - fast, 0.0) for slow, fast in zip(own["whole"], own["sampled"], strict=True)]
    worth = sum(gains) > shared
    strategies: list[Strategy] = ["sampled" if worth and gain else "whole" for gain in gains]
    least = sum(own["whole"]) - max(sum(gains) - shared, 0.0)
    if sum(own["applied"]) + 2 * shared < least:
        strategies, least = ["applied"] * len(workloads), sum(own["applied"]) + 2 * shared
    if costs.launch and sum(own["together"]) < least:
        strategies = ["together"] * len(workloads)
    shares: dict[Strategy, float] = {
        "whole": 0.0,
        "sampled": shared / max(1, sum(gain > 0 for gain in gains)),
        "applied": 2 * shared / len(workloads),
    }
    if costs.launch:  # otherwise nothing is built together
        shares["together"] = 0.0
    return tuple(
        Decision(strategy, {name: own[name][i] + share for name, share in shares.items()})
        for i, strategy in enumerate(strategies)
    )


def seconds_of(
    workloads: Sequence[Workload], tokens: int, dtype: torch.dtype, costs: Costs
) -> tuple[dict[Strategy, list[float]], float]:
    """Return the seconds of each strategy for each update without transforming the activations, and those of that transform.

    "Sampled" updates share one such transform, "applied" ones two: one forward, and one back for the gradient.
    """
    built = [_built(one, costs) for one in workloads]
    own: dict[Strategy, list[float]] = {
        "whole": [first + _whole(one, tokens, dtype, costs) for first, one in zip(built, workloads, strict=True)],
        "sampled": [first + _sampled(one, tokens, costs) for first, one in zip(built, workloads, strict=True)],
        "applied": [_applied(one, tokens, costs) for one in workloads],
        "together": [_together(one, tokens, dtype, costs) for one in workloads],
    }
    for strategy, seconds in own.items():
        own[strategy] = [one + _LAUNCHES[strategy] * costs.launch for one in seconds]
    return own, _transformed(workloads[0].shape[1], tokens, costs)


def _built(one: Workload, costs: Costs) -> float:
    rows, cols = one.shape
    made = _transformed(cols, rows, costs) + one.cells * rows * costs.spread + rows * cols * costs.add
    return made + _arranged(one, 1, costs)


def _whole(one: Workload, tokens: int, dtype: torch.dtype, costs: Costs) -> float:
    if not one.offsets:
        return 0.0
    (rows, cols), product = one.shape, costs.half_product if dtype.itemsize < 4 else costs.product
    spectrum = _transformed(cols, rows, costs)
    if reads_whole_spectrum(one):  # cells are then looked up, for which they need not be sorted
        spectrum += _transformed(rows, cols, costs) + _arranged(one, one.offsets, costs) / 2
    else:
        spectrum += _dots(one, rows, costs)
    return rows * cols * tokens * product + spectrum


def _sampled(one: Workload, tokens: int, costs: Costs) -> float:
    """Return the seconds without the transform of the activations, which is shared."""
    return (_transformed(one.shape[0], tokens, costs) if one.offsets else 0) + _dots(one, tokens, costs)


def _applied(one: Workload, tokens: int, costs: Costs) -> float:
    """Return the seconds without the transforms of the activations and back to their gradient, which are shared."""
    products = 2 * one.cells * tokens * costs.spread
    return 2 * _transformed(one.shape[0], tokens, costs) + products + _arranged(one, 2, costs) + _dots(one, tokens, costs)


def _together(one: Workload, tokens: int, dtype: torch.dtype, costs: Costs) -> float:
    """Return the seconds with products over the components or the frequencies.

    In half precision, each product consists of three products of bfloat16 parts.
    """
    (rows, cols), half = one.shape, dtype.itemsize < 4
    over = one.cells if 2 * one.cells < rows + cols else rows + cols
    ways = 2 if one.offsets else 1
    made = ways * over * (3 * costs.half_product if half else costs.product) + costs.add
    return rows * cols * (made + (tokens * (costs.half_product if half else costs.product) if one.offsets else 0.0))


def _dots(one: Workload, tokens: int, costs: Costs) -> float:
    return one.cells * one.offsets * tokens * costs.dot + _arranged(one, one.offsets, costs)


def _arranged(one: Workload, times: int, costs: Costs) -> float:
    """Return the seconds for sorting cells, whose order is cached while they do not move."""
    return times * (costs.piece + one.cells * costs.cell) if one.offsets > 1 else 0.0


def _transformed(length: int, vectors: int, costs: Costs) -> float:
    count = len(pieces(vectors, length, torch.get_num_threads()))
    return vectors * length * math.log2(2 * length) * costs.transform + count * costs.piece
