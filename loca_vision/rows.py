"""Updates of some rows of a weight: adding them, and a linear map whose gradient is computed for those rows only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

Rows = slice | Tensor | None  # a range, an index (p,) int64, or all rows
RowDelta = tuple[Rows, Tensor]  # the rows, and what is added to them: (p, q)
LowRankRows = tuple[Rows, Tensor, Tensor]  # the rows, and the factors (p, r) and (r, q) of what is added to them


def add_rows(base: Tensor, updates: list[RowDelta]) -> Tensor:
    """`base` (n, q) with each update (p, q) added to its rows, rounded to base's dtype once; other rows stay bit-identical.

    Slices go through one concatenation, whose gradient is views of the weight's; interleaved rows through an index.
    """
    wide = base if base.dtype == torch.float64 else base.float()
    if not (torch.is_grad_enabled() or torch.compiler.is_compiling()):
        return add_in_place(wide.clone() if wide is base else wide, updates).to(base.dtype)
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


def add_in_place(weight: Tensor, updates: list[RowDelta]) -> Tensor:
    """The same, where autograd does not look, in a fifth of the time; changes and returns `weight` (n, q)."""
    for rows, delta in updates:
        if isinstance(rows, Tensor):
            weight.index_add_(0, rows.to(weight.device), delta.to(weight.dtype))
        else:
            weight[rows or slice(None)] += delta
    return weight


def computed_in(x: Tensor) -> torch.dtype:
    """The dtype of a product with x: autocast's where it is on, but for float64, which it leaves alone."""
    autocast = torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64
    return torch.get_autocast_dtype(x.device.type) if autocast else x.dtype


def as_computed(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The same in autocast's dtype, where it is on."""
    if not torch.is_autocast_enabled(x.device.type):
        return x, weight, bias
    dtype = computed_in(x)
    return x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def row_linear(x: Tensor, weight: Tensor, bias: Tensor | None, updates: list[RowDelta]) -> Tensor:
    """x weight^T + bias, in autocast's dtype where it is on: (..., q) to (..., n).

    `weight` (n, q) already contains the updates and has no gradient; each update's is that of its own rows of the weight,
    so that nothing is computed for rows nobody adapts, a third of a fused qkv with query and value.
    """
    rows, deltas = zip(*updates, strict=True)
    result: Tensor = _RowLinear.apply(*as_computed(x, weight, bias), rows, *deltas)
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


def low_rank_linear(x: Tensor, weight: Tensor, bias: Tensor | None, pairs: list[LowRankRows]) -> Tensor:
    """x weight^T + bias + `low_rank_term`: (..., q) to (..., n); `weight` (n, q) does not contain the updates."""
    flat = x.reshape(-1, x.shape[-1])  # of more axes the product is a view, which autograd copies where it is changed in place
    result = add_low_rank(F.linear(flat, weight, bias), flat, pairs)
    return result.view(*x.shape[:-1], result.shape[-1])


def low_rank_term(x: Tensor, rows: int, pairs: list[LowRankRows]) -> Tensor:
    """x times the sum of these products of factors, each on its rows: (..., q) to (..., rows), in x's or autocast's dtype."""
    return add_low_rank(x.new_zeros(*x.shape[:-1], rows, dtype=computed_in(x)), x, pairs)


def add_low_rank(result: Tensor, x: Tensor, pairs: list[LowRankRows]) -> Tensor:
    """`result` (..., n) + `low_rank_term`."""
    if torch.compiler.is_compiling():
        for where, up, down in pairs:
            term = F.linear(F.linear(x, down.to(x)), up.to(x)).to(result.dtype)
            index = torch.arange(result.shape[-1], device=x.device)[slice(None) if where is None else where]
            result = result.index_add(-1, index, term)
        return result
    rows, ups, downs = zip(*pairs, strict=True)
    added: Tensor = _AddLowRank.apply(result, x, rows, len(pairs), *(factor.to(result) for factor in (*ups, *downs)))
    return added


class _AddLowRank(torch.autograd.Function):
    """In place. One product for all the inner factors, which see the same x; of the outer ones, no more than their own rows."""

    @staticmethod
    def forward(ctx: Any, result: Tensor, x: Tensor, rows: tuple[Rows, ...], count: int, *factors: Tensor) -> Tensor:
        features, down = x.reshape(-1, x.shape[-1]).to(result.dtype), torch.cat(factors[count:])
        inner = torch.split(features @ down.T, [up.shape[1] for up in factors[:count]], 1)
        flat = result.view(-1, result.shape[-1])
        for where, up, part in zip(rows, factors[:count], inner, strict=True):
            if isinstance(where, Tensor):
                flat.index_add_(1, where.to(flat.device), part @ up.T)
            else:
                flat[:, where or slice(None)].addmm_(part, up.T)
        ctx.rows, ctx.form = rows, (x.shape, x.dtype)
        ctx.save_for_backward(features, down, *inner, *factors[:count])
        ctx.mark_dirty(result)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        features, down, *rest = ctx.saved_tensors
        inner, ups = rest[: len(ctx.rows)], rest[len(ctx.rows) :]
        flat = grad.reshape(-1, grad.shape[-1])
        parts = [flat if where is None else flat[:, where] for where in ctx.rows]
        grad_inner = torch.cat([part @ up for part, up in zip(parts, ups, strict=True)], 1)
        grad_ups = [part.T @ hidden for part, hidden in zip(parts, inner, strict=True)]
        grad_downs = torch.split(grad_inner.T @ features, [up.shape[1] for up in ups])
        shape, dtype = ctx.form
        grad_x = (grad_inner @ down).view(shape).to(dtype) if ctx.needs_input_grad[1] else None
        return grad, grad_x, None, None, *grad_ups, *grad_downs
