"""Count, from sizes, the floating-point operations and bytes that an update adds to its frozen layer.

A transform of N numbers of length m counts 2.5 N log2 m operations, as is usual for FFTs. Every operand of a step counts as
read or written once, four bytes a number, whether or not a cache holds it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from loca_vision.functional.cost_model import Workload

_BYTES = 4


@dataclass(frozen=True)
class Work:
    """Floating-point operations and memory traffic.

    Attributes:
        flops: floating-point operations.
        bytes: bytes read and written.
    """

    flops: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.bytes + other.bytes)


NOTHING = Work()


def of_building(shape: tuple[int, int], cells: int) -> Work:
    """Count a sparse spectrum times cosines, one transform, and the sum with W; each reads and writes the matrix once."""
    size = math.prod(shape)
    return Work(2 * cells * shape[1] + _transform(size, shape[0]) + size, 6 * _BYTES * size)


def of_whole_gradient(workload: Workload, tokens: int) -> Work:
    """Count dY^T X and its transform along both axes."""
    (rows, cols), size = workload.shape, math.prod(workload.shape)
    transforms = _transform(size, rows) + _transform(size, cols)
    return Work(2 * tokens * size + transforms, _BYTES * (tokens * (rows + cols) + 5 * size))


def of_sampled_gradient(workload: Workload, tokens: int, sharing: int) -> Work:
    """Count the transforms of dY and, shared by `sharing` projections, of X, and a dot product for each value."""
    (rows, cols), values = workload.shape, workload.cells * workload.offsets
    read = tokens * (rows + cols / sharing)
    transforms = _transform(tokens * rows, rows) + _transform(tokens * cols, cols) / sharing
    return Work(transforms + 2 * tokens * values, _BYTES * (read + 5 * values))


def of_applying(workload: Workload, tokens: int, sharing: int) -> Work:
    """Count transforming activations (shared by `sharing` projections), multiplying by the spectrum, and transforming back.

    The gradients take the same.
    """
    rows, cols = workload.shape
    transforms = _transform(tokens * rows, rows) + _transform(tokens * cols, cols) / sharing
    return Work(transforms + 2 * tokens * workload.cells, 2 * _BYTES * tokens * (rows + cols / sharing))


def of_factors(shape: tuple[int, int], rank: int, tokens: int, products: int) -> Work:
    """Count `products` passes of two thin products over the tokens: one forward, two backward."""
    numbers = tokens * (sum(shape) + 2 * rank) + rank * sum(shape)
    return Work(2 * products * tokens * rank * sum(shape), _BYTES * products * numbers)


def _transform(numbers: float, length: int) -> float:
    return 2.5 * numbers * math.log2(max(length, 1))
