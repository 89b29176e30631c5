"""Batches with few components: products over the components.

The rows of L and R are the cosines C[u_k] and D[v_k] of the components. Then Delta W = L^T (a * R), and the gradient z_k of a
coefficient is the sum of row k of (L G) * R. Replacing L or R with its slopes yields the gradients of the locations.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from loca_vision.functional.batch_tables import BatchCells, parts_of_table, stacked, table
from loca_vision.functional.split_products import HALVES, LEFT, RIGHT, TWICE, is_exact, parts, product


def matrices(values: Tensor, layout: BatchCells, split: bool) -> Tensor:
    """Return the sums (N, p, q) for values (M,), with equally many values per sum."""
    (p, q), count = layout.shape, len(layout.counts)
    rows, cols = layout.cells.T
    right = (table(q, None, values)[cols] * values[:, None]).view(count, -1, q)
    if not split:
        return table(p, None, values)[rows].view(count, -1, p).mT @ right
    left = parts_of_table(p, None, HALVES, 0, values.device)[layout.rows_in_parts]
    return product(left.mT, parts(right, RIGHT, 1))


def rows(grads: Sequence[Tensor], layout: BatchCells, difference: str | None, like: Tensor, split: bool) -> list[Tensor]:
    """Return z (M,) and, if a difference is given, the slopes along both axes."""
    (p, q), count = layout.shape, len(layout.counts)
    which, cols = layout.cells.T
    exact = is_exact(grads[0])
    operand = stacked(grads, (TWICE if exact else RIGHT) if split else None, like)

    def read(kind: str | None) -> Tensor:
        """Return L G, or its slope along the rows, (N, B, q)."""
        if not split:
            return table(p, kind, like)[which].view(count, -1, p) @ operand
        left = parts_of_table(p, kind, HALVES if exact else LEFT, 1, like.device)[which]
        return product(left.view(count, -1, left.shape[1]), operand)

    found, right = read(None), table(q, None, like)[cols].view(count, -1, q)
    sums = [(found * right).sum(-1).flatten()]
    if difference is not None:
        sums.append((read(difference) * right).sum(-1).flatten())
        sums.append((found * table(q, difference, like)[cols].view(count, -1, q)).sum(-1).flatten())
    return sums
