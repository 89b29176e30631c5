"""Which way a cosine update and its gradient are computed while it learns: a model of what each costs, from sizes alone.

There are three. *Whole*: W + Delta W is built; so is the gradient dY^T X, which is transformed and read at the cells.
*Sampled*: W + Delta W is built; activations and output gradients are transformed token by token, and a cell's gradient is a dot
product over the tokens. *Applied*: nothing is built; the transformed activations are multiplied by the sparse spectrum and
transformed back. The transform of the activations is shared by all projections that one product adapts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from loca_vision.frequencies import pieces

Way = Literal["whole", "sampled", "applied"]


@dataclass(frozen=True)
class Costs:
    """Seconds that one thread of a device takes.

    Attributes:
        product: of a product of float32 matrices, for a multiplication with its addition.
        half_product: the same of bfloat16 or float16.
        transform: of the whole gradient, for a number and each doubling of the transform's length.
        tokens: of activations, or of rows of a weight, to frequencies and back: the same.
        spread: of a product with a sparse spectrum, for a component and each vector.
        dot: of a cell's dot product, for a multiplication with its addition.
        cell: of a cell, besides.
        piece: of a piece of the tokens, besides.
        add: of a number of W + Delta W, besides.
        serial: the share of `tokens`, `transform` and `add` that more threads make no faster.
    """

    product: float
    half_product: float
    transform: float
    tokens: float
    spread: float
    dot: float
    cell: float
    piece: float
    add: float
    serial: float = 0.3

    def of_threads(self, threads: int) -> Costs:
        """What they are together; cells and pieces are bookkeeping, which one of them does."""
        shared = self.serial + (1 - self.serial) / threads
        even = {name: getattr(self, name) / threads for name in ("product", "half_product", "spread", "dot")}
        return replace(self, **even, **{name: getattr(self, name) * shared for name in ("transform", "tokens", "add")})


# By device. `examples/benchmarks/paths.py` measures them, and prints a line to put here or to assign. A device that is not here
# takes the whole gradient: matrix products are what accelerators do best.
COSTS: dict[str, Costs] = {
    "cpu": Costs(
        product=1.3e-11,
        half_product=2.9e-12,
        transform=3.6e-10,
        tokens=1.8e-10,
        spread=2.5e-10,
        dot=8.6e-11,
        cell=9.4e-8,
        piece=9e-5,
        add=1e-9,
    )
}


@dataclass(frozen=True)
class Asked:
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
class Choice:
    """
    Attributes:
        way: how the update and its gradient are computed.
        seconds: of each way by the model, with a fair share of what is shared; empty where a device's costs are not known.
    """

    way: Way
    seconds: Mapping[Way, float] = field(default_factory=dict)


def choose(asked: list[Asked], tokens: int, device: torch.device, dtype: torch.dtype) -> list[Choice]:
    """A way for each of the updates that share their activations (n, q), the cheapest for all of them together."""
    if device.type not in COSTS or not asked or not tokens:
        return [Choice("whole")] * len(asked)
    own, shared = seconds_of(asked, tokens, dtype, COSTS[device.type].of_threads(torch.get_num_threads()))
    gains = [max(slow - fast, 0.0) for slow, fast in zip(own["whole"], own["sampled"], strict=True)]
    worth = sum(gains) > shared
    ways: list[Way] = ["sampled" if worth and gain else "whole" for gain in gains]
    if sum(own["applied"]) + 2 * shared < sum(own["whole"]) - max(sum(gains) - shared, 0.0):
        ways = ["applied"] * len(asked)
    shares: dict[Way, float] = {
        "whole": 0.0,
        "sampled": shared / max(1, sum(gain > 0 for gain in gains)),
        "applied": 2 * shared / len(asked),
    }
    return [Choice(way, {one: own[one][i] + share for one, share in shares.items()}) for i, way in enumerate(ways)]


def seconds_of(asked: list[Asked], tokens: int, dtype: torch.dtype, costs: Costs) -> tuple[dict[Way, list[float]], float]:
    """Of each way for each of the updates; and of a transform of the activations, which they share: those that are sampled one,
    those that are applied two, there and back with the gradient.
    """
    built = [_built(one, costs) for one in asked]
    own: dict[Way, list[float]] = {
        "whole": [first + _whole(one, tokens, dtype, costs) for first, one in zip(built, asked, strict=True)],
        "sampled": [first + _sampled(one, tokens, costs) for first, one in zip(built, asked, strict=True)],
        "applied": [_applied(one, tokens, costs) for one in asked],
    }
    return own, _transformed(asked[0].shape[1], tokens, costs)


def _built(one: Asked, costs: Costs) -> float:
    rows, cols = one.shape
    return _transformed(cols, rows, costs) + one.cells * rows * costs.spread + rows * cols * costs.add


def _whole(one: Asked, tokens: int, dtype: torch.dtype, costs: Costs) -> float:
    size = math.prod(one.shape) if one.places else 0
    product = costs.half_product if dtype.itemsize < 4 else costs.product
    return size * (tokens * product + math.log2(max(size, 1)) * costs.transform)


def _sampled(one: Asked, tokens: int, costs: Costs) -> float:
    """Without the transform of the activations, which is shared."""
    values = one.cells * one.places
    return (_transformed(one.shape[0], tokens, costs) if values else 0) + values * (tokens * costs.dot + costs.cell)


def _applied(one: Asked, tokens: int, costs: Costs) -> float:
    """Without the transforms of the activations and back to their gradient, which are shared."""
    transforms = 2 * _transformed(one.shape[0], tokens, costs)
    return transforms + one.cells * (2 * tokens * costs.spread + one.places * (tokens * costs.dot + costs.cell))


def _transformed(length: int, vectors: int, costs: Costs) -> float:
    count = len(pieces(vectors, length, torch.get_num_threads()))
    return vectors * length * math.log2(2 * length) * costs.tokens + count * costs.piece / 2
