"""Updates of some rows of a weight: adding them, and a linear map whose gradient is computed for those rows only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

Rows = slice | Tensor | None  # a range, an index (p,) int64, or all rows
Update = tuple[Rows, Tensor]  # the rows, and what is added to them: (p, q)


def add_rows(base: Tensor, updates: list[Update]) -> Tensor:
    """`base` (n, q) with each update (p, q) added to its rows, rounded to base's dtype once; other rows stay bit-identical.

    Slices go through one concatenation, whose gradient is views of the weight's; interleaved rows through an index.
    """
    wide = base if base.dtype == torch.float64 else base.float()
    slices = [(rows or slice(0, len(base)), delta) for rows, delta in updates if not isinstance(rows, Tensor)]
    pieces, end = [], 0
    for rows, delta in sorted(slices, key=lambda update: update[0].start):
        pieces += [wide[end : rows.start]] * (rows.start > end) + [wide[rows] + delta]
        end = rows.stop
    pieces += [wide[end:]] * (end < len(base))
    wide = torch.cat(pieces) if len(pieces) > 1 else pieces[0]
    for index, delta in updates:
        if isinstance(index, Tensor):
            wide = wide.index_add(0, index.to(base.device), delta.to(wide.dtype))
    return wide.to(base.dtype)


def row_linear(x: Tensor, weight: Tensor, bias: Tensor | None, updates: list[Update]) -> Tensor:
    """x weight^T + bias, in autocast's dtype where it is on: (..., q) to (..., n).

    `weight` (n, q) already contains the updates and has no gradient; each update's is that of its own rows of the weight,
    so that nothing is computed for rows nobody adapts, a third of a fused qkv with query and value.
    """
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:  # which autocast leaves alone
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    rows, deltas = zip(*updates, strict=True)
    result: Tensor = _RowLinear.apply(x, weight, bias, rows, *deltas)
    return result


class _RowLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, rows: tuple[Rows, ...], *deltas: Tensor) -> Tensor:
        ctx.rows = rows
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        wants_x, _, wants_bias, _, *wanted = ctx.needs_input_grad
        flat, features = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1]).to(grad.dtype)
        deltas = [
            (flat if rows is None else flat[:, rows]).T @ features if wants else None
            for rows, wants in zip(ctx.rows, wanted, strict=True)
        ]
        return grad @ weight if wants_x else None, None, flat.sum(0) if wants_bias else None, None, *deltas
