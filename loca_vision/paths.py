"""Which way the spectrum of a weight's gradient is found: a model of what each costs, from sizes alone.

There are two. *Whole*: the gradient dY^T X as a matrix, transformed and read at the cells. *Sampled*: activations and output
gradients transformed token by token, and a dot product over the tokens for each cell. The transform of the activations is
shared by all projections that one product adapts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

# Numbers of one operand that are transformed at a time: what the steps in between keep stays in a core's own cache.
_NUMBERS_AT_ONCE = 3 * 2**15
_LEAST_TOKENS, _MOST_TOKENS = 32, 512


@dataclass(frozen=True)
class Costs:
    """Seconds that one thread of a device takes.

    Attributes:
        product: of a product of float32 matrices, for a multiplication with its addition.
        half_product: the same of bfloat16 or float16.
        transform: of the whole gradient, for a number and each doubling of the transform's length.
        tokens: of activations, transformed and turned to a row for each frequency: the same.
        dot: of a cell's dot product, for a multiplication with its addition.
        cell: of a cell, besides.
        piece: of a piece of the tokens, besides.
        serial: the share of `tokens` and `transform` that more threads make no faster.
    """

    product: float
    half_product: float
    transform: float
    tokens: float
    dot: float
    cell: float
    piece: float
    serial: float = 0.4

    def of_threads(self, threads: int) -> Costs:
        """What they are together; cells and pieces are bookkeeping, which one of them does."""
        shared = self.serial + (1 - self.serial) / threads
        even = {name: getattr(self, name) / threads for name in ("product", "half_product", "dot")}
        return replace(self, **even, transform=self.transform * shared, tokens=self.tokens * shared)


# By device. `examples/benchmarks/paths.py` measures them, and prints a line to put here or to assign. A device that is not here
# takes the whole gradient: matrix products are what accelerators do best.
COSTS: dict[str, Costs] = {
    "cpu": Costs(
        product=1.3e-11,
        half_product=2.9e-12,
        transform=3.6e-10,
        tokens=2.8e-10,
        dot=8.6e-11,
        cell=9.4e-8,
        piece=9e-5,
    )
}


@dataclass(frozen=True)
class Asked:
    """What is asked of the gradient of one update.

    Attributes:
        shape: (p, q) of the update.
        cells: B.
        places: at how many places of each cell, 1 for coefficients, up to 5 while locations move; 0 for nothing.
    """

    shape: tuple[int, int]
    cells: int
    places: int


@dataclass(frozen=True)
class Choice:
    """
    Attributes:
        sampled: whether the gradient is sampled.
        seconds_whole, seconds_sampled: of both ways by the model, with a fair share of the activations' transform; None where a
            device's costs are not known.
    """

    sampled: bool
    seconds_whole: float | None = None
    seconds_sampled: float | None = None


def choose(asked: list[Asked], tokens: int, device: torch.device, dtype: torch.dtype) -> list[Choice]:
    """A way for each of the updates that share their activations (n, q), the cheapest for all of them together."""
    if device.type not in COSTS or not asked:
        return [Choice(False)] * len(asked)
    costs = COSTS[device.type].of_threads(torch.get_num_threads())
    whole = [_whole(one, tokens, dtype, costs) for one in asked]
    few = [_sampled(one, tokens, costs) for one in asked]
    gains = [slow - fast if one.places and fast < slow else 0.0 for one, slow, fast in zip(asked, whole, few, strict=True)]
    shared = _transformed(asked[0].shape[1], tokens, costs)
    share = shared / max(1, sum(gain > 0 for gain in gains))
    return [
        Choice(gain > 0 and sum(gains) > shared, slow, fast + share) for gain, slow, fast in zip(gains, whole, few, strict=True)
    ]


def tokens_at_once(width: int) -> int:
    """Of activations and gradients that are no wider than this; as many more as there are threads to share them."""
    most = torch.get_num_threads() * _NUMBERS_AT_ONCE // width
    return min(max(most, _LEAST_TOKENS), _MOST_TOKENS) // 16 * 16


def _whole(one: Asked, tokens: int, dtype: torch.dtype, costs: Costs) -> float:
    rows, cols = one.shape
    product = costs.half_product if dtype.itemsize < 4 else costs.product
    return rows * cols * (tokens * product + math.log2(rows * cols) * costs.transform)


def _sampled(one: Asked, tokens: int, costs: Costs) -> float:
    """Without the transform of the activations, which is shared."""
    values = one.cells * one.places
    return _transformed(one.shape[0], tokens, costs) + values * (tokens * costs.dot + costs.cell)


def _transformed(length: int, tokens: int, costs: Costs) -> float:
    pieces = math.ceil(tokens / tokens_at_once(length))
    return tokens * length * math.log2(2 * length) * costs.tokens + pieces * costs.piece / 2
