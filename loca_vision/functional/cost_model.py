"""Which way a cosine update and its gradient are computed while it learns: a model of what each costs, from sizes alone.

There are three. *Whole*: W + Delta W is built; so is the gradient dY^T X, which is transformed and read at the cells.
*Sampled*: W + Delta W is built; activations and output gradients are transformed token by token, and a cell's gradient is a dot
product over the tokens. *Applied*: nothing is built; the transformed activations are multiplied by the sparse spectrum and
transformed back. The transform of the activations is shared by all projections that one product adapts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Literal

import torch

from loca_vision.functional.packed_dct import pieces

Strategy = Literal["whole", "sampled", "applied"]


@dataclass(frozen=True)
class Costs:
    """Seconds that one thread of a device takes.

    Attributes:
        product: of a product of float32 matrices, for a multiplication with its addition.
        half_product: the same of bfloat16 or float16.
        transform: of vectors to frequencies and back, for a number and each doubling of the transform's length.
        spread: of a product with a sparse spectrum, for a component and each vector.
        dot: of a cell's dot product, for a multiplication with its addition.
        cell: of a cell that is put in order, where locations move.
        piece: of a piece of the tokens, and of cells that are put in order, besides.
        add: of a number of W + Delta W, besides.
        serial: the share of `transform` and `add` that more threads make no faster.
    """

    product: float
    half_product: float
    transform: float
    spread: float
    dot: float
    cell: float
    piece: float
    add: float
    serial: float = 0.35

    def of_threads(self, threads: int) -> Costs:
        """What they are together; cells and pieces are bookkeeping, which one of them does."""
        shared = self.serial + (1 - self.serial) / threads
        even = {name: getattr(self, name) / threads for name in ("product", "half_product", "spread", "dot")}
        return replace(self, **even, **{name: getattr(self, name) * shared for name in ("transform", "add")})


# By device. `examples/benchmarks/paths.py` measures them, and prints a line to put here or to assign. A device that is not here
# takes the whole gradient: matrix products are what accelerators do best.
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
    """What is asked of one update.

    Attributes:
        shape: (p, q) of the update.
        cells: B.
        places: at how many places of each cell its gradient, 1 for coefficients, up to 5 while locations move; 0 for nothing.
    """

    shape: tuple[int, int]
    cells: int
    places: int


@dataclass(frozen=True)
class Decision:
    """
    Attributes:
        way: how the update and its gradient are computed.
        seconds: of each way by the model, with a fair share of what is shared; empty where a device's costs are not known.
    """

    way: Strategy
    seconds: Mapping[Strategy, float] = field(default_factory=dict)


# A dot product of a gradient's spectrum costs about as much as this many numbers of the whole spectrum.
_SAMPLE_COST = 32


def reads_whole_spectrum(one: Workload) -> bool:
    """Whether a whole gradient is transformed along both axes, and not along one with a dot product for each cell."""
    return one.cells * one.places * _SAMPLE_COST > math.prod(one.shape)


def choose(asked: list[Workload], tokens: int, device: torch.device, dtype: torch.dtype) -> list[Decision]:
    """A way for each of the updates that share their activations (n, q), the cheapest for all of them together."""
    if device.type not in COSTS or not asked or not tokens:
        return [Decision("whole")] * len(asked)
    return list(_choose(tuple(asked), tokens, dtype, COSTS[device.type], torch.get_num_threads()))


@lru_cache(maxsize=1024)
def _choose(asked: tuple[Workload, ...], tokens: int, dtype: torch.dtype, costs: Costs, threads: int) -> tuple[Decision, ...]:
    own, shared = seconds_of(asked, tokens, dtype, costs.of_threads(threads))
    gains = [max(slow - fast, 0.0) for slow, fast in zip(own["whole"], own["sampled"], strict=True)]
    worth = sum(gains) > shared
    ways: list[Strategy] = ["sampled" if worth and gain else "whole" for gain in gains]
    if sum(own["applied"]) + 2 * shared < sum(own["whole"]) - max(sum(gains) - shared, 0.0):
        ways = ["applied"] * len(asked)
    shares: dict[Strategy, float] = {
        "whole": 0.0,
        "sampled": shared / max(1, sum(gain > 0 for gain in gains)),
        "applied": 2 * shared / len(asked),
    }
    return tuple(Decision(way, {one: own[one][i] + share for one, share in shares.items()}) for i, way in enumerate(ways))


def seconds_of(
    asked: Sequence[Workload], tokens: int, dtype: torch.dtype, costs: Costs
) -> tuple[dict[Strategy, list[float]], float]:
    """Of each way for each of the updates; and of a transform of the activations, which they share: those that are sampled one,
    those that are applied two, there and back with the gradient.
    """
    built = [_built(one, costs) for one in asked]
    own: dict[Strategy, list[float]] = {
        "whole": [first + _whole(one, tokens, dtype, costs) for first, one in zip(built, asked, strict=True)],
        "sampled": [first + _sampled(one, tokens, costs) for first, one in zip(built, asked, strict=True)],
        "applied": [_applied(one, tokens, costs) for one in asked],
    }
    return own, _transformed(asked[0].shape[1], tokens, costs)


def _built(one: Workload, costs: Costs) -> float:
    rows, cols = one.shape
    made = _transformed(cols, rows, costs) + one.cells * rows * costs.spread + rows * cols * costs.add
    return made + _arranged(one, 1, costs)


def _whole(one: Workload, tokens: int, dtype: torch.dtype, costs: Costs) -> float:
    if not one.places:
        return 0.0
    (rows, cols), product = one.shape, costs.half_product if dtype.itemsize < 4 else costs.product
    spectrum = _transformed(cols, rows, costs)
    if reads_whole_spectrum(one):  # where cells are looked up, which takes no order of them
        spectrum += _transformed(rows, cols, costs) + _arranged(one, one.places, costs) / 2
    else:
        spectrum += _dots(one, rows, costs)
    return rows * cols * tokens * product + spectrum


def _sampled(one: Workload, tokens: int, costs: Costs) -> float:
    """Without the transform of the activations, which is shared."""
    return (_transformed(one.shape[0], tokens, costs) if one.places else 0) + _dots(one, tokens, costs)


def _applied(one: Workload, tokens: int, costs: Costs) -> float:
    """Without the transforms of the activations and back to their gradient, which are shared."""
    products = 2 * one.cells * tokens * costs.spread
    return 2 * _transformed(one.shape[0], tokens, costs) + products + _arranged(one, 2, costs) + _dots(one, tokens, costs)


def _dots(one: Workload, tokens: int, costs: Costs) -> float:
    return one.cells * one.places * tokens * costs.dot + _arranged(one, one.places, costs)


def _arranged(one: Workload, times: int, costs: Costs) -> float:
    """Cells put in order, which is remembered while they stay."""
    return times * (costs.piece + one.cells * costs.cell) if one.places > 1 else 0.0


def _transformed(length: int, vectors: int, costs: Costs) -> float:
    count = len(pieces(vectors, length, torch.get_num_threads()))
    return vectors * length * math.log2(2 * length) * costs.transform + count * costs.piece
