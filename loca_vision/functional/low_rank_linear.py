"""A linear map plus low-rank terms on some of its rows, without building a matrix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from loca_vision.functional.row_linear import Rows, computed_in
from loca_vision.functional.transforms import functional_only, once_differentiable

LowRankRows = tuple[Rows, Tensor, Tensor]  # the rows, and the factors (p, r) and (r, q) of what is added to them


def low_rank_linear(x: Tensor, weight: Tensor, bias: Tensor | None, pairs: list[LowRankRows]) -> Tensor:
    """Return x weight^T + bias + `low_rank_term`: (..., q) to (..., n); `weight` (n, q) does not contain the updates."""
    flat = x.reshape(
        -1, x.shape[-1]
    )  # with more axes, F.linear returns a view, and autograd copies views that are changed in place
    result = add_low_rank(F.linear(flat, weight, bias), flat, pairs)
    return result.view(*x.shape[:-1], result.shape[-1])


def low_rank_term(x: Tensor, rows: int, pairs: list[LowRankRows]) -> Tensor:
    """Return x times the sum of the factor products, each on its rows: (..., q) to (..., rows), in x's or autocast's dtype."""
    return add_low_rank(x.new_zeros(*x.shape[:-1], rows, dtype=computed_in(x)), x, pairs)


def add_low_rank(result: Tensor, x: Tensor, pairs: list[LowRankRows]) -> Tensor:
    """Return `result` (..., n) + `low_rank_term`."""
    if torch.compiler.is_compiling() or functional_only():
        for where, up, down in pairs:
            term = F.linear(F.linear(x, down.to(x)), up.to(x)).to(result.dtype)
            index = torch.arange(result.shape[-1], device=x.device)[slice(None) if where is None else where]
            result = result.index_add(-1, index, term)
        return result
    rows, ups, downs = zip(*pairs, strict=True)
    added: Tensor = _AddLowRank.apply(result, x, rows, len(pairs), *(factor.to(result) for factor in (*ups, *downs)))
    return added


class _AddLowRank(torch.autograd.Function):
    """In place. The inner factors see the same x and share one product; outer factors touch only their own rows."""

    @staticmethod
    def forward(ctx: Any, result: Tensor, x: Tensor, rows: tuple[Rows, ...], count: int, *factors: Tensor) -> Tensor:
        features, down = x.reshape(-1, x.shape[-1]).to(result.dtype), _joined(factors[count:], 0)
        inner = torch.split(features @ down.T, [up.shape[1] for up in factors[:count]], 1)
        flat = result.view(-1, result.shape[-1])
        for where, up, part in zip(rows, factors[:count], inner, strict=True):
            if isinstance(where, Tensor):
                flat.index_add_(1, where.to(flat.device), part @ up.T)
            else:
                flat[:, where or slice(None)].addmm_(part, up.T)
        ctx.rows, ctx.input_form = rows, (x.shape, x.dtype)
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
        grad_inner = _joined([part @ up for part, up in zip(parts, ups, strict=True)], 1)
        grad_ups = [part.T @ hidden for part, hidden in zip(parts, inner, strict=True)]
        grad_downs = torch.split(grad_inner.T @ features, [up.shape[1] for up in ups])
        shape, dtype = ctx.input_form
        grad_x = (grad_inner @ down).view(shape).to(dtype) if ctx.needs_input_grad[1] else None
        return grad, grad_x, None, None, *grad_ups, *grad_downs


def _joined(matrices: Sequence[Tensor], dim: int) -> Tensor:
    """Concatenate matrices; a single one, as in a layer that is not fused, is not copied."""
    return matrices[0] if len(matrices) == 1 else torch.cat(list(matrices), dim)
