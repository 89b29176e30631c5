"""Which way the spectrum of a weight's gradient is found: a model of what each costs, from sizes alone.

There are two. *Whole*: the gradient dY^T X as a matrix, transformed and read at the cells. *Sampled*: activations and output
gradients transformed token by token, and a dot product over the tokens for each cell. The transform of the activations is
shared by all projections that see them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Costs:
    """Seconds that one thread of a device takes.

    Attributes:
        product: for a multiplication and addition of a matrix product in float32.
        half_product: the same in bfloat16 or float16.
        transform: for a number of the whole gradient and a factor of two in the length of its transform.
        tokens: the same of activations, with turning them to a row for each frequency.
        dot: for a multiplication and addition of the dot product of a cell.
        chunk: what each piece of the tokens costs whatever its size.
    """

    product: float
    half_product: float
    transform: float
    tokens: float
    dot: float
    chunk: float


# Measured with examples/benchmarks/paths.py, which prints a line like these for the machine it runs on. A device that is not
# here takes the whole gradient: its matrix products are what it does best.
COSTS: dict[str, Costs] = {"cpu": Costs(17e-12, 2e-12, 0.35e-9, 0.15e-9, 0.12e-9, 40e-6)}


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


def sampled(asked: list[Asked], tokens: int, device: torch.device, dtype: torch.dtype) -> list[bool]:
    """For each update of one weight, whether its gradient is sampled: as cheap as the model knows for all together."""
    costs = COSTS.get(device.type)
    if costs is None or not asked:
        return [False] * len(asked)
    gains = [whole_seconds(one, tokens, dtype, costs) - sampled_seconds(one, tokens, costs) for one in asked]
    gained = [one.places > 0 and gain > 0 for one, gain in zip(asked, gains, strict=True)]
    total = sum(gain for gain, wins in zip(gains, gained, strict=True) if wins)
    worthwhile = total > shared_seconds(asked[0].shape[1], tokens, costs)
    return [worthwhile and wins for wins in gained]


def whole_seconds(one: Asked, tokens: int, dtype: torch.dtype, costs: Costs) -> float:
    rows, cols = one.shape
    product = costs.half_product if dtype.itemsize < 4 else costs.product
    return rows * cols * (tokens * product + math.log2(rows * cols) * costs.transform)


def sampled_seconds(one: Asked, tokens: int, costs: Costs) -> float:
    """Without the transform of the activations, which is shared."""
    return _transform_seconds(one.shape[0], tokens, costs) + tokens * one.cells * one.places * costs.dot


def shared_seconds(cols: int, tokens: int, costs: Costs) -> float:
    return _transform_seconds(cols, tokens, costs)


def _transform_seconds(length: int, tokens: int, costs: Costs) -> float:
    return tokens * length * math.log2(2 * length) * costs.tokens + costs.chunk * math.ceil(tokens / 128)
